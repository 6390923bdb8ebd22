// Keys press the button or follow the link that names them in `aria-keyshortcuts`, so that what a key does is
// what its button says and does.
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
  // A key that is held down goes through examples, but decides and starts nothing more than once.
  if (event.repeat && !["n", "p", "ArrowLeft", "ArrowRight"].includes(event.key)) return;
  const target = event.target;
  if (target instanceof Element && target.closest("input:not([type=file]), textarea, select, canvas")) return;
  for (const element of document.querySelectorAll("[aria-keyshortcuts]")) {
    if (!element.getAttribute("aria-keyshortcuts").split(" ").includes(event.key)) continue;
    if (element.disabled || element.offsetParent === null) continue;
    event.preventDefault();
    element.click();
    return;
  }
});
