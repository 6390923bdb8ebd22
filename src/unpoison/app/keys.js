// Keys press the button or follow the link that names them in `aria-keyshortcuts`, so that what a key does is
// what its button says and does.
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
  const target = event.target;
  if (target instanceof Element && target.closest("input, textarea, select, canvas")) return;
  for (const element of document.querySelectorAll("[aria-keyshortcuts]")) {
    if (!element.getAttribute("aria-keyshortcuts").split(" ").includes(event.key)) continue;
    if (element.disabled || element.offsetParent === null) continue;
    event.preventDefault();
    element.click();
    return;
  }
});
