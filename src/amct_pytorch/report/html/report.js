"use strict";
(function () {
  var root = document.documentElement;
  var theme = document.getElementById("theme");
  var print = document.getElementById("print");
  var dark = window.matchMedia("(prefers-color-scheme: dark)");

  function stored(value) {
    // A page opened from a file may have no storage.
    try {
      if (value === undefined) return localStorage.getItem("amct-theme");
      localStorage.setItem("amct-theme", value);
    } catch (error) { /* the choice lasts as long as the page */ }
    return null;
  }
  function isDark() {
    return root.dataset.theme ? root.dataset.theme === "dark" : dark.matches;
  }
  function label() {
    theme.textContent = isDark() ? "Light" : "Dark";
    theme.setAttribute("aria-label", "Switch to " + theme.textContent.toLowerCase() + " colours");
    theme.setAttribute("aria-pressed", String(isDark()));
  }
  var kept = stored();
  if (kept === "dark" || kept === "light") root.dataset.theme = kept;
  theme.hidden = print.hidden = false;
  label();
  theme.addEventListener("click", function () {
    root.dataset.theme = isDark() ? "light" : "dark";
    stored(root.dataset.theme);
    label();
  });
  dark.addEventListener("change", label);
  print.addEventListener("click", function () { window.print(); });

  function key(row, column) {
    var cell = row.cells[column];
    var order = cell.dataset.order;
    if (order === undefined) return null;
    var number = Number(order);
    return Number.isNaN(number) ? order.toLowerCase() : number;
  }
  function compare(a, b) {
    if (typeof a === typeof b) return a < b ? -1 : a > b ? 1 : 0;
    return typeof a === "number" ? -1 : 1;
  }
  document.querySelectorAll("table.sortable").forEach(function (table) {
    var body = table.tBodies[0];
    Array.from(table.tHead.rows[0].cells).forEach(function (head, column) {
      var button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      head.textContent = "";
      head.appendChild(button);
      button.addEventListener("click", function () {
        var up = head.getAttribute("aria-sort") !== "ascending";
        Array.from(table.tHead.rows[0].cells).forEach(function (other) {
          other.removeAttribute("aria-sort");
        });
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        var rows = Array.from(body.rows).map(function (row, place) {
          return { row: row, place: place, key: key(row, column) };
        });
        rows.sort(function (a, b) {
          // What has no value stays at the end, whichever way.
          if (a.key === null || b.key === null) {
            return (a.key === null) - (b.key === null) || a.place - b.place;
          }
          return (up ? 1 : -1) * compare(a.key, b.key) || a.place - b.place;
        });
        rows.forEach(function (item) { body.appendChild(item.row); });
      });
    });
  });

  var filter = document.getElementById("filter");
  var count = document.getElementById("count");
  var layers = Array.from(document.querySelectorAll("#table tbody tr"));
  filter.hidden = false;
  filter.addEventListener("input", function () {
    var wanted = filter.value.trim().toLowerCase();
    var shown = 0;
    layers.forEach(function (row) {
      row.hidden = wanted !== "" && !row.textContent.toLowerCase().includes(wanted);
      if (!row.hidden) shown += 1;
    });
    count.textContent = wanted ? shown + " of " + layers.length + " layers" : "";
  });

  // A layer that is gone to gets the focus, so that the keyboard goes on from there.
  function arrive() {
    var target = location.hash && document.getElementById(location.hash.slice(1));
    if (!target || !target.matches("#table tr")) return;
    if (target.hidden) {
      filter.value = "";
      filter.dispatchEvent(new Event("input"));
    }
    target.focus({ preventScroll: true });
    target.scrollIntoView({ block: "center" });
  }
  window.addEventListener("hashchange", arrive);
  arrive();

  // Arrow keys go from row to row.
  document.getElementById("table").addEventListener("keydown", function (event) {
    var step = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[event.key];
    var row = event.target.closest("tbody tr");
    if (!step || !row || event.target !== row) return;
    var next = row[step];
    while (next && next.hidden) next = next[step];
    if (next) {
      event.preventDefault();
      next.focus();
    }
  });
}());
