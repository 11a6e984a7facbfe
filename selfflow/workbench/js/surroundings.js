function render({ model, el }) {
  const theme = () => {
    const dark = document.body.dataset.jpThemeLight === "false";
    if (model.get("dark") !== dark) { model.set("dark", dark); model.save_changes(); }
  };
  const watchers = [new MutationObserver(theme)];
  watchers[0].observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light"] });
  let tries = 0, timer = setInterval(() => {
    const box = el.closest(".selfflow-explorer");
    if (++tries > 200 || box) clearInterval(timer);
    if (!box) return;
    const name = () => box.querySelectorAll(".noUi-handle").forEach(handle => {
      const label = handle.closest(".jupyter-widgets").querySelector("label, .widget-label");
      if (label && handle.ariaLabel !== label.textContent) handle.ariaLabel = label.textContent;
    });
    box.dataset.lmSuppressShortcuts = "true";
    box.addEventListener("keydown", event => {              // a choice that has the focus answers to keys, not the notebook
      if (!event.ctrlKey && !event.metaKey && !event.altKey) event.stopPropagation();
    });
    name();
    watchers.push(new MutationObserver(name));
    watchers[1].observe(box, { childList: true, subtree: true });
    let wide = 0;
    watchers.push(new ResizeObserver(() => {                // plotly follows the window alone, not a pane of it
      if (box.clientWidth === wide) return;
      wide = box.clientWidth;
      requestAnimationFrame(() => window.dispatchEvent(new Event("resize")));
    }));
    watchers[2].observe(box);
  }, 50);
  theme();
  return () => { clearInterval(timer); watchers.forEach(watcher => watcher.disconnect()); };
}
export default { render };
