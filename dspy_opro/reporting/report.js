"use strict";
// A click on a heading sorts the table by its column, and a second click turns the order.
// Estimates and empty cells come last in both orders.
const headings = [...document.querySelectorAll("table.trials th")];
const sort = (column, order) => {
  for (const other of headings) other.removeAttribute("aria-sort");
  headings[column].setAttribute("aria-sort", order);
  const body = document.querySelector("table.trials").tBodies[0];
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
};
for (const button of document.querySelectorAll("table.trials th button")) {
  button.addEventListener("click", () => {
    const heading = button.parentElement;
    const opposite = { ascending: "descending", descending: "ascending" };
    sort(headings.indexOf(heading), opposite[heading.getAttribute("aria-sort")] ?? heading.dataset.first);
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

// The page of a run that is under way reloads itself, and stays where the reader was.
const key = `opro ${location.pathname}`;
const allDetails = () => [...document.querySelectorAll("details")];
const name = (details) => details.closest("[id]")?.id ?? details.querySelector("summary").textContent.trim();
// What the keyboard is on. A pointer leaves no mark, so nothing needs to come back.
const label = (element) =>
  element && (element.getAttribute("href") ?? element.closest("[id]")?.id + element.textContent);
const remember = () => {
  const sorted = headings.findIndex((heading) => heading.ariaSort);
  return JSON.stringify({
    top: scrollY,
    focus: label(document.querySelector(":focus-visible")),
    open: allDetails().filter((details) => details.open).map(name),
    column: sorted,
    order: headings[sorted]?.ariaSort,
  });
};
let kept = null;
try {
  kept = JSON.parse(sessionStorage.getItem(key));
  sessionStorage.removeItem(key);
} catch {
  // The browser keeps nothing for this page.
}
if (kept) {
  history.scrollRestoration = "manual";
  for (const details of allDetails()) details.open = kept.open.includes(name(details));
  if (kept.order && headings[kept.column]) sort(kept.column, kept.order);
  document.documentElement.style.scrollBehavior = "auto";
  scrollTo(0, kept.top);
  const focusable = [...document.querySelectorAll("a, button, summary")];
  focusable.find((element) => label(element) === kept.focus)?.focus({ preventScroll: true });
} else {
  reveal();
}
const written = document.body.dataset.live;
if (written) {
  const age = Date.now() / 1000 - written;
  if (age > 120) {
    document.querySelector(".status").classList.add("stale");
    document.querySelector(".status span").textContent =
      `No news for ${Math.round(age / 60)} minutes. The process of this run may have ended.`;
  }
  const reload = () => {
    if (document.hidden || !getSelection().isCollapsed) return;
    try {
      sessionStorage.setItem(key, remember());
    } catch {
      // The browser keeps nothing for this page.
    }
    location.reload();
  };
  setInterval(reload, age > 120 ? 30000 : 4000);
}
