"use strict";
for (const table of document.querySelectorAll("table.board.sortable")) {
  const body = table.tBodies[0];
  table.querySelectorAll("th button").forEach((button, column) => {
    button.disabled = false;
    button.addEventListener("click", () => {
      const heading = button.closest("th");
      const down = heading.getAttribute("aria-sort") === "ascending";
      for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => row.cells[column + 1].dataset.value;
      const known = (text) => text !== "";
      const order = (a, b) => (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
      [...body.rows]
        .sort((first, second) => {
          const a = value(first), b = value(second);
          if (known(a) !== known(b)) return known(a) ? -1 : 1;
          return down ? order(b, a) : order(a, b);
        })
        .forEach((row) => body.append(row));
    });
  });
}
