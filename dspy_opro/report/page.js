"use strict";
// A heading sorts its column: numbers by value, empty cells last, a second press the other way.
for (const button of document.querySelectorAll("table.trials th button")) {
  button.addEventListener("click", () => {
    const heading = button.parentElement;
    const column = [...heading.parentElement.children].indexOf(heading);
    const body = heading.closest("table").tBodies[0];
    const descending = heading.getAttribute("aria-sort") === "ascending";
    for (const other of heading.parentElement.children) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const value = (row) => row.cells[column].dataset.value;
    const compare = (a, b) => {
      if (a === "" || b === "") return (a === "") - (b === "");
      const order = isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
      return descending ? -order : order;
    };
    body.append(...[...body.rows].sort((a, b) => compare(value(a), value(b))));
  });
}
// A link to a trial opens its texts.
const reveal = () => {
  const row = location.hash && document.querySelector(location.hash);
  row?.querySelector("details")?.setAttribute("open", "");
};
addEventListener("hashchange", reveal);
reveal();
