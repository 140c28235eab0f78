// The table of completions: search, filters, sorting, and tokens coloured when a row is opened.
// The state is kept in the address (#q=…&outcome=wrong), so that a view can be bookmarked. Text of the run is only
// ever set as text, never as markup.
(function () {
  var table = document.getElementById('completions');
  if (!table) return;
  var controls = document.getElementById('controls'), count = document.getElementById('count');
  var rows = Array.from(table.querySelectorAll('details'));
  var fields = Array.from(controls.querySelectorAll('[name]'));
  var heads = Array.from(table.querySelectorAll('button[data-sort]'));
  var sort = 'order', down = false;
  rows.forEach(function (row, index) { row.dataset.order = index; });

  function value(name) { return controls.querySelector('[name=' + name + ']').value; }

  function fits(row) {
    var facts = row.dataset, rate = parseFloat(facts.rate), wanted = value('rate');
    if (value('outcome') && facts.outcome !== value('outcome')) return false;
    if (value('step') && facts.step !== value('step')) return false;
    if (value('demo') && facts.demo !== value('demo')) return false;
    if (wanted === 'none' && rate !== 0) return false;
    if (wanted === 'some' && !(rate > 0 && rate < 1)) return false;
    if (wanted === 'all' && rate !== 1) return false;
    var words = value('q').toLowerCase().split(/\s+/).filter(Boolean);
    if (!words.length) return true;
    if (row.lowered === undefined) row.lowered = (row.textContent + ' ' + (facts.question || '')).toLowerCase();
    return words.every(function (word) { return row.lowered.indexOf(word) >= 0; });
  }

  function order() {
    // Rows without a value come last in both directions.
    var known = rows.filter(function (row) { return row.dataset[sort] !== ''; });
    var rest = rows.filter(function (row) { return row.dataset[sort] === ''; });
    known.sort(function (a, b) {
      var x = a.dataset[sort], y = b.dataset[sort];
      var difference = sort === 'demo' ? (x < y ? -1 : x > y ? 1 : 0) : x - y;
      return (down ? -difference : difference) || a.dataset.order - b.dataset.order;
    });
    known.concat(rest).forEach(function (row) { table.appendChild(row); });
    heads.forEach(function (head) {
      var active = head.dataset.sort === sort;
      head.dataset.direction = active ? (down ? '▼' : '▲') : '';
      head.setAttribute('aria-pressed', active ? 'true' : 'false');
    });
  }

  function show() {
    var shown = 0;
    rows.forEach(function (row) {
      row.hidden = !fits(row);
      if (!row.hidden) shown += 1;
    });
    count.textContent = shown + ' of ' + rows.length + ' shown';
  }

  function keep() {
    var state = new URLSearchParams();
    fields.forEach(function (field) { if (field.value) state.set(field.name, field.value); });
    if (sort !== 'order') state.set('sort', (down ? '-' : '') + sort);
    var text = '#' + state;
    if (location.hash !== text && (location.hash || text !== '#')) location.replace(text);
  }

  function restore() {
    var state = new URLSearchParams(location.hash.slice(1));
    fields.forEach(function (field) { field.value = state.get(field.name) || ''; });
    var wanted = state.get('sort') || 'order';
    down = wanted[0] === '-';
    sort = wanted.replace('-', '');
    if (sort !== 'order' && !heads.some(function (head) { return head.dataset.sort === sort; })) sort = 'order';
    order();
    show();
  }

  function paint(pre) {
    if (pre.dataset.painted) return;
    pre.dataset.painted = 'yes';
    // Characters as Python counts them: an emoji is one, where JavaScript's own strings have two halves.
    var text = Array.from(pre.textContent), at = 0, made = document.createDocumentFragment();
    var nats = pre.dataset.nats.split(','), levels = pre.dataset.levels;
    pre.dataset.lengths.split(',').forEach(function (length, index) {
      var end = at + Number(length), piece = document.createElement('span');
      piece.className = 't' + levels[index];
      piece.title = nats[index] === '' ? 'not finite' : nats[index] + ' nats';
      piece.textContent = text.slice(at, end).join('');
      if (end > at) made.appendChild(piece);
      at = end;
    });
    pre.textContent = '';
    pre.appendChild(made);
  }

  rows.forEach(function (row) {
    row.addEventListener('toggle', function () {
      var pre = row.querySelector('pre.tokens');
      if (row.open && pre) paint(pre);
    });
  });
  fields.forEach(function (field) {
    field.addEventListener('input', function () { show(); keep(); });
  });
  heads.forEach(function (head) {
    head.addEventListener('click', function () {
      // Large values are what one looks for first; a third click brings back the order of the run.
      if (sort !== head.dataset.sort) { sort = head.dataset.sort; down = true; }
      else if (down) down = false;
      else sort = 'order';
      order();
      keep();
    });
  });
  document.getElementById('open').addEventListener('click', function () {
    rows.forEach(function (row) { if (!row.hidden) row.open = true; });
  });
  document.getElementById('close').addEventListener('click', function () {
    rows.forEach(function (row) { row.open = false; });
  });
  document.getElementById('clear').addEventListener('click', function () {
    fields.forEach(function (field) { field.value = ''; });
    sort = 'order'; down = false;
    order(); show(); keep();
  });
  window.addEventListener('hashchange', restore);
  controls.hidden = false;
  heads.forEach(function (head) { head.disabled = false; });
  restore();
})();
