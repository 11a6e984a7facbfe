function render({ model, el }) {
  const table = document.createElement("table"), boxes = [];
  let names = [], current = 0;
  table.className = "selfflow-runs";
  const make = (parent, tag, text) => {
    const child = document.createElement(tag);
    if (text !== undefined) child.textContent = text;
    parent.append(child);
    return child;
  };
  table.setAttribute("aria-label", "runs");
  const head = make(make(table, "thead"), "tr"), body = make(table, "tbody");
  ["", ...model.get("columns")].forEach(text => make(head, "th", text).scope = "col");
  el.style.overflowX = "auto";
  el.append(table);
  function set(name, on) {
    const chosen = new Set(model.get("value"));
    if (on) chosen.add(name); else chosen.delete(name);
    model.set("value", names.filter(known => chosen.has(known)));
    model.save_changes();
  }
  function mark() {
    const chosen = new Set(model.get("value"));
    boxes.forEach((box, row) => {
      box.checked = chosen.has(names[row]);
      box.tabIndex = row === current ? 0 : -1;
      box.closest("tr").classList.toggle("chosen", box.checked);
    });
  }
  function build() {
    const rows = model.get("rows"), focused = names[boxes.indexOf(document.activeElement)];
    if (rows.length !== names.length || rows.some((row, place) => row[0] !== names[place])) {
      body.replaceChildren();
      boxes.length = 0;
      names = rows.map(row => row[0]);
      rows.forEach(cells => {
        const row = make(body, "tr"), box = make(make(row, "td"), "input");
        box.type = "checkbox";
        box.setAttribute("aria-label", `choose ${cells[0]}`);
        cells.forEach(() => make(row, "td"));
        box.addEventListener("change", () => set(cells[0], box.checked));
        box.addEventListener("focus", () => { current = boxes.indexOf(box); mark(); });
        row.addEventListener("click", event => { if (event.target !== box) { box.focus(); set(cells[0], !box.checked); } });
        boxes.push(box);
      });
      current = Math.max(0, names.indexOf(focused));
      if (focused !== undefined) boxes[current]?.focus();
    }
    rows.forEach((cells, row) => cells.forEach((text, column) => {
      const cell = body.rows[row].cells[column + 1];
      if (cell.textContent !== text) cell.textContent = text;
    }));
    table.hidden = !rows.length;
    mark();
  }
  table.addEventListener("keydown", event => {
    const way = { ArrowUp: current - 1, ArrowDown: current + 1, Home: 0, End: boxes.length - 1 }[event.key];
    if (way === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    boxes[way]?.focus();
  });
  const heard = [["change:rows", build], ["change:value", mark]];
  heard.forEach(([what, function_]) => model.on(what, function_));
  build();
  let tries = 0;
  const timer = setInterval(() => {                          // until it is on the page
    const whole = el.closest(".selfflow-browser");
    if (++tries > 200 || whole) clearInterval(timer);
    whole?.addEventListener("keydown", event => {            // keys without Ctrl are for what has the focus, not for the notebook
      if (!event.ctrlKey && !event.metaKey && !event.altKey) event.stopPropagation();
    });
  }, 50);
  const seen = change => {
    model.views = (model.views ?? 0) + change;
    model.set("shown", model.views > 0);
    model.save_changes();
  };
  seen(1);
  return () => {
    clearInterval(timer);
    heard.forEach(([what, function_]) => model.off(what, function_));
    seen(-1);
  };
}
export default { render };
