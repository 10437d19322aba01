"use strict";
// A click on a heading sorts the table by its column, and a second click turns the order.
// Estimates and empty cells come last in both orders.
for (const button of document.querySelectorAll("table.trials th button")) {
  button.addEventListener("click", () => {
    const heading = button.parentElement;
    const column = [...heading.parentElement.children].indexOf(heading);
    const body = heading.closest("table").tBodies[0];
    const opposite = { ascending: "descending", descending: "ascending" };
    const order = opposite[heading.getAttribute("aria-sort")] ?? heading.dataset.first;
    for (const other of heading.parentElement.children) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", order);
    const compare = (one, other) => {
      const [a, b] = [one.cells[column].dataset, other.cells[column].dataset];
      if ("last" in a || "last" in b) {
        const difference = ("last" in a) - ("last" in b);
        if (difference) return difference;
      }
      const rising = isNaN(a.value) || isNaN(b.value) ? a.value.localeCompare(b.value) : a.value - b.value;
      return order === "descending" ? -rising : rising;
    };
    body.append(...[...body.rows].sort(compare));
  });
}
// A copy button copies the text below it. Where the browser forbids this, the text is selected.
for (const button of document.querySelectorAll("button.copy")) {
  button.addEventListener("click", async () => {
    const text = button.closest(".box").querySelector(".text");
    getSelection().selectAllChildren(text);
    try {
      await navigator.clipboard.writeText(text.textContent);
      getSelection().removeAllRanges();
      button.textContent = "Copied";
    } catch {
      button.textContent = document.execCommand("copy") ? "Copied" : "Selected";
    }
    setTimeout(() => (button.textContent = "Copy"), 2000);
  });
}
// A link to a trial opens its texts.
const reveal = () => {
  const row = /^#trial-\d+$/.test(location.hash) && document.querySelector(location.hash);
  if (!row) return;
  row.querySelector("details").open = true;
  row.scrollIntoView({ block: "center" });
};
addEventListener("hashchange", reveal);
reveal();
