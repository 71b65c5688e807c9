// Work that is done again and again while somebody looks.

/** Runs `work` now and `period` milliseconds after each end; not while the page is hidden. Returns what runs it at once. */
export function every(period, work) {
  let timer = 0;
  let running = false;
  let again = false;

  async function now() {
    again = running;
    if (running) return;
    clearTimeout(timer);
    running = true;
    try {
      do {
        again = false;
        await work();
      } while (again);
    } finally {
      running = false;
      if (!document.hidden) timer = setTimeout(now, period);
    }
  }

  document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : now()));
  now();
  return now;
}
