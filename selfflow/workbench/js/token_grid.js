function render({ model, el }) {
  const frame = document.createElement("div"), image = document.createElement("img"), buttons = [];
  let brush = null, current = 0;
  frame.className = "selfflow-tokens";
  frame.dataset.lmSuppressShortcuts = "true";               // arrow keys move between tokens, not between cells
  frame.setAttribute("role", "group");
  image.draggable = false;
  image.alt = "";
  const caption = document.createElement("div");
  caption.className = "selfflow-tokens-caption";
  el.append(caption, frame);
  const chosen = () => new Set(model.get("value"));
  function set(token, on) {
    const now = model.get("many") ? chosen() : new Set();
    if (on || !model.get("many")) now.add(token); else now.delete(token);
    model.set("value", [...now].sort((a, b) => a - b));
    model.save_changes();
  }
  function move(token) {
    if (!buttons[token]) return;
    buttons[current].tabIndex = -1;
    current = token;
    buttons[current].tabIndex = 0;
    buttons[current].focus();
  }
  function neighbour(x, y) {                                // the nearest in a direction, sideways counts double
    const places = model.get("places"), centre = ([l, t, w, h]) => [l + w / 2, t + h / 2];
    const [fromX, fromY] = centre(places[current]), wide = image.clientWidth, high = image.clientHeight;
    let best = -1, least = Infinity;
    places.forEach((place, token) => {
      const [dx, dy] = centre(place).map((at, i) => (at - [fromX, fromY][i]) * [wide, high][i]);
      const along = dx * x + dy * y, across = Math.abs(dx * y) + Math.abs(dy * x);
      if (along > 0.5 && along + 2 * across < least) [best, least] = [token, along + 2 * across];
    });
    return best;
  }
  function mark() {
    const now = chosen(), [yes, no] = model.get("words");
    frame.classList.toggle("marked", model.get("marked"));
    buttons.forEach((button, token) => {
      button.setAttribute("aria-pressed", now.has(token));
      button.setAttribute("aria-label", `${model.get("names")[token] ?? "token " + token}: ${now.has(token) ? yes : no}`);
      button.title = button.getAttribute("aria-label");
    });
  }
  function build() {
    frame.replaceChildren(image);
    frame.setAttribute("aria-label", model.get("description"));
    caption.textContent = model.get("description");
    buttons.length = 0;
    model.get("places").forEach(([left, top, width, height], token) => {
      const button = document.createElement("button");
      button.type = "button";
      Object.assign(button.style, { left: `${100 * left}%`, top: `${100 * top}%`, width: `${100 * width}%`,
                                    height: `${100 * height}%` });
      button.addEventListener("pointerdown", event => {
        if (event.button !== 0) return;
        button.releasePointerCapture?.(event.pointerId);
        brush = !chosen().has(token);
        move(token);
        set(token, brush);
      });
      button.addEventListener("pointerenter", event => { if (brush !== null && event.buttons & 1) set(token, brush); });
      button.addEventListener("click", event => { if (event.detail === 0) set(token, !chosen().has(token)); });
      buttons.push(button);
      frame.append(button);
    });
    current = Math.min(current, Math.max(0, buttons.length - 1));
    buttons.forEach((button, token) => { button.tabIndex = token === current ? 0 : -1; });
    mark();
  }
  frame.addEventListener("keydown", event => {
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    const end = { Home: 0, End: buttons.length - 1 }[event.key];
    if (!way && end === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    move(way ? neighbour(...way) : end);
  });
  function show() {
    const bytes = model.get("picture"), before = image.src;
    if (!bytes?.byteLength) return;
    image.src = URL.createObjectURL(new Blob([bytes], { type: "image/png" }));
    if (before) URL.revokeObjectURL(before);
  }
  const release = () => { brush = null; };
  window.addEventListener("pointerup", release);
  const heard = [["change:picture", show], ["change:places", build], ["change:names", mark], ["change:value", mark],
                 ["change:marked", mark]];
  heard.forEach(([what, function_]) => model.on(what, function_));
  build();
  show();
  return () => {
    window.removeEventListener("pointerup", release);
    heard.forEach(([what, function_]) => model.off(what, function_));
  };
}
export default { render };
