// The rush as a k6 script, against a running server:
//
//   OVERSOLD_ADMIN_TOKEN=… BASE_URL=http://127.0.0.1:8080 k6 run load/k6/rush.js
//
// k6 exits with 99 when a guarantee is broken, when an expected break is not observed, or when the run is void: k6 could not send what it
// should have sent, so what it saw says nothing about the server.
//
//   BASE_URL, OVERSOLD_ADMIN_TOKEN   the server, and its admin token
//   SALE=1                           the sale to create; it must not exist yet
//   BUYERS=1000 CAPACITY=100         buyers, and tickets on sale
//   CLICKS=1                         requests that each buyer sends at once, each under its own key
//   VUS=200                          concurrent buyers: 200 virtual users play 1,000 buyers
//   PATIENCE=20                      how long a buyer repeats a request whose outcome is unknown, in seconds
//   PAYMENT_URL=http://HOST:PORT     the payment service of the server: its ledger must agree with how the orders ended
//   BREAKS=I1,I2 LEAVES_OPEN=I3      invariants that this server is expected to break, and those without a guarantee
//   SUMMARY=FILE                     the file to write the measurements to, as JSON
//   SCENARIO=arrivals                buyers come at a constant rate, whether or not the server keeps up: an open loop, for latencies
//   RATE=100 SECONDS=10              buyers per second, and for how long; there are tickets for all
//
// The rush is a closed loop: a virtual user that waits for an answer sends nothing meanwhile, so a server that stalls holds back the requests
// that would have met the stall (coordinated omission). SCENARIO=arrivals keeps its rate, and what k6 could not send makes the run void: more
// VUS send more.
import { check, sleep } from 'k6';
import exec from 'k6/execution';
import http from 'k6/http';
import { Counter, Gauge, Trend } from 'k6/metrics';

const setting = (name, otherwise) => __ENV[name] || otherwise;
const number = (name, otherwise, most) => {
  const value = Number(setting(name, otherwise));
  if (!Number.isInteger(value) || value < 0 || value > most) {
    throw new Error(`${name} holds "${__ENV[name]}"; expected a number, 0 to ${most}`);
  }
  return value;
};

const SCENARIO = setting('SCENARIO', 'rush');
if (!['rush', 'arrivals'].includes(SCENARIO)) {
  throw new Error(`SCENARIO holds "${SCENARIO}"; expected rush or arrivals`);
}
const ARRIVALS = SCENARIO === 'arrivals';
const RATE = number('RATE', 100, 2000);
const SECONDS = number('SECONDS', 10, 60);
const BUYERS = ARRIVALS ? RATE * SECONDS : number('BUYERS', 1000, 20000);
const CAPACITY = ARRIVALS ? 2 * BUYERS : number('CAPACITY', 100, 1000000);
const CLICKS = number('CLICKS', 1, 50);
// At a constant rate k6 may begin one iteration more, in the last instant.
const VUS = Math.min(ARRIVALS ? BUYERS + 1 : BUYERS, number('VUS', 200, 1000));
const PATIENCE = number('PATIENCE', 20, 300);
const SALE = number('SALE', 1, Number.MAX_SAFE_INTEGER);
const BASE_URL = setting('BASE_URL', 'http://127.0.0.1:8080');
const PAYMENT_URL = setting('PAYMENT_URL', '');

// The invariants that a client can check, each as a counter: above 0 it is broken.
const INVARIANTS = {
  I1: { title: 'no oversell', counter: new Counter('oversold') },
  I2: { title: 'conservation', counter: new Counter('unbalanced') },
  I3: { title: 'no duplicate reservation', counter: new Counter('duplicates') },
  I4: { title: 'nothing lost', counter: new Counter('lost') },
  I5: { title: 'nothing invented', counter: new Counter('invented') },
  I7: { title: 'no undersell', counter: new Counter('undersold') },
  I10: { title: 'progress', counter: new Counter('unfinished') },
  I11: { title: 'paid once', counter: new Counter('unpaid') },
};
const count = (code, by) => INVARIANTS[code].counter.add(by);

// Requests that failed in this process, before they reached the network.
const unsent = new Counter('unsent');
const requests = new Counter('requests');
const confirmed = new Counter('confirmed');
const accepted = new Counter('accepted');
const refused = new Counter('refused');
const unknown = new Counter('unknown');
// Orders that were declined, expired or cancelled.
const returned = new Counter('returned');
// Looks at the sale with more reservations, held or confirmed, than there are tickets: they break I1 as well.
const overheld = new Counter('overheld');
const stock = new Gauge('stock');
const reserved = new Gauge('reserved');
const mostReserved = new Gauge('most_reserved');
const charges = new Gauge('charges');
const refunds = new Gauge('refunds');
// From a click to the last answer to it, repeats included.
const answered = new Trend('answered', true);
// From a click to the final state, where orders are accepted first (202) and decided later.
const completed = new Trend('completed', true);

const codes = (name) => setting(name, '').split(',').filter((code) => code !== '');
const LEAVES_OPEN = codes('LEAVES_OPEN').concat(ARRIVALS ? codes('BREAKS') : []);
// Buyers at a constant rate need not cause what a rush does.
const BREAKS = ARRIVALS ? [] : codes('BREAKS');
for (const code of BREAKS) {
  if (!(code in INVARIANTS)) {
    throw new Error(`BREAKS holds ${code}, which this script can't see; expected ${Object.keys(INVARIANTS).join(', ')}`);
  }
}

// dropped_iterations is k6's own: buyers for whom there was no virtual user, or no time.
const thresholds = { checks: ['rate==1'], unsent: ['count<=0'], dropped_iterations: ['count<=0'] };
for (const [code, { counter }] of Object.entries(INVARIANTS)) {
  if (!LEAVES_OPEN.includes(code)) {
    thresholds[counter.name] = [BREAKS.includes(code) ? 'count>0' : 'count<=0'];
  }
}
if (![...LEAVES_OPEN, ...BREAKS].includes('I1')) {
  thresholds.overheld = ['count<=0'];
}
if (!ARRIVALS) {
  thresholds.iterations = [`count==${BUYERS}`];
}

export const options = {
  scenarios: {
    rush: ARRIVALS
      ? {
          executor: 'constant-arrival-rate',
          rate: RATE,
          timeUnit: '1s',
          duration: `${SECONDS}s`,
          preAllocatedVUs: VUS,
          // Nobody is cut off: once for the answer, and once for the final state.
          gracefulStop: `${2 * PATIENCE + 10}s`,
        }
      : {
          executor: 'shared-iterations',
          iterations: BUYERS,
          vus: VUS,
          // Once for the answer, and once for the final state.
          maxDuration: `${Math.ceil(BUYERS / VUS) * 2 * PATIENCE + 10}s`,
        },
  },
  thresholds,
  batch: CLICKS,
  batchPerHost: CLICKS,
  // Refunds come after the answers.
  teardownTimeout: `${PATIENCE + 60}s`,
  summaryTrendStats: ['med', 'p(95)', 'p(99)'],
};

// A refusal is an answer, not a failure.
http.setResponseCallback(http.expectedStatuses(200, 201, 202, 409, 429, 503));

const json = { 'Content-Type': 'application/json' };
const sale = `${BASE_URL}/api/sales/${SALE}`;

export function setup() {
  const body = JSON.stringify({ name: 'the last tickets', capacity: CAPACITY });
  const headers = { ...json, Authorization: `Bearer ${setting('OVERSOLD_ADMIN_TOKEN', '')}` };
  const opened = http.put(sale, body, { headers });
  if (opened.status !== 201) {
    throw new Error(`opening sale ${SALE} at ${BASE_URL} was answered with ${opened.status} ${opened.body || opened.error}`);
  }
  // Thresholds of counters without a sample are not evaluated.
  Object.keys(INVARIANTS).forEach((code) => count(code, 0));
  [unsent, requests, confirmed, accepted, refused, unknown, returned, overheld].forEach((counter) => counter.add(0));
  count('I1', -CAPACITY);
  count('I7', ARRIVALS ? 0 : Math.min(CAPACITY, BUYERS));
  // What was paid for before is not of this rush.
  return { paidBefore: PAYMENT_URL ? ledger().map((entry) => entry.reservation) : [] };
}

// The charges and refunds of the payment service so far.
function ledger() {
  const read = http.get(`${PAYMENT_URL}/ledger`);
  if (read.status !== 200) {
    throw new Error(`the ledger of the payment service at ${PAYMENT_URL} was answered with ${read.status} ${read.body || read.error}`);
  }
  return read.json();
}

// Whether this process had no socket or no port left: the server never heard of the request.
const isUnsent = (answer) => answer.status === 0 && /too many open files|cannot assign requested address|can't assign requested/.test(answer.error);

// Classifies an answer by the HTTP contract that all levels share.
function classify(answer, buyer) {
  // Over a rate limit nothing happened, and the buyer comes again.
  if (answer.status === 0 || answer.status === 503 || answer.status === 429) {
    return { unknown: true };
  }
  let body;
  try {
    body = answer.json();
  } catch (_) {
    return { unexpected: true };
  }
  if (answer.status === 201 && body.id && body.buyer_id === buyer) {
    return { reservation: body.id };
  }
  if (answer.status === 202 && body.id && body.buyer_id === buyer && answer.headers.Location) {
    return { location: answer.headers.Location };
  }
  if (answer.status === 409 && ['/problems/sold-out', '/problems/already-reserved'].includes(body.type)) {
    return { refused: true };
  }
  return { unexpected: true };
}

// Counts orders without a final answer. Each may have a reservation all the same, and be held and not paid for.
function unfinished(orders) {
  count('I10', orders);
  count('I5', -orders);
  count('I7', -orders);
  count('I11', -orders);
}

// The final state of an accepted order, or null while it is pending. A stream of events ends with the final one.
function finalState(answer) {
  const events = isStream(answer) ? answer.body.split('\n').filter((line) => line.startsWith('data:')) : null;
  let state;
  try {
    state = events ? JSON.parse(events[events.length - 1].slice('data:'.length)) : answer.json();
  } catch (_) {
    return null;
  }
  if (state.status === 'confirmed') {
    return { reservation: state.id };
  }
  // An order that ended otherwise got no ticket, or has given one back after others were refused.
  const mayHaveReleased = ['expired', 'declined', 'cancelled'].includes(state.status);
  return mayHaveReleased || state.status === 'refused' ? { refused: true, mayHaveReleased } : null;
}

const isStream = (answer) => answer.status === 200 && (answer.headers['Content-Type'] || '').startsWith('text/event-stream');

// Waits for the events with the final states of a buyer's accepted orders, or, where there are none, polls, until PATIENCE is over. Returns
// the number of orders without a final state.
function follow(locations, began, reservations) {
  const deadline = Date.now() + PATIENCE * 1000;
  let pause = 0.02;
  let open = locations.map((location) => ({ location, path: `${location}/events` }));
  while (open.length > 0 && Date.now() < deadline) {
    const sent = Date.now();
    const timeout = `${deadline - sent}ms`;
    const answers = http.batch(open.map(({ path }) => ['GET', `${BASE_URL}${path}`, null, { timeout, tags: { name: 'follow' } }]));
    open = open.filter((order, index) => {
      const answer = answers[index];
      unsent.add(isUnsent(answer) ? 1 : 0);
      if (answer.status !== 0 && !isStream(answer)) {
        order.path = order.location;
      }
      const state = finalState(answer);
      if (state === null) {
        return true;
      }
      const { blocked, connecting, duration } = answer.timings;
      completed.add(sent - began + blocked + connecting + duration);
      if (state.reservation) {
        reservations.add(state.reservation);
      }
      if (state.mayHaveReleased) {
        returned.add(1);
        // As the judge has it: no more tickets may be left than may have come back.
        count('I7', -1);
      }
      return false;
    });
    if (open.length > 0) {
      // Less and less often, so that polling does not slow the server down.
      sleep(pause * (1 + Math.random() / 2));
      pause = Math.min(2 * pause, 0.25);
    }
  }
  return open.length;
}

// Reads the sale, if its tickets are held until they are paid for: those must never be too many, and in the end all are confirmed or back.
function look() {
  const read = http.get(sale, { tags: { name: 'look' } });
  unsent.add(isUnsent(read) ? 1 : 0);
  if (read.status === 200) {
    const { reserved: held } = read.json();
    mostReserved.add(held);
    overheld.add(held > CAPACITY ? 1 : 0);
  }
}

// One buyer: all clicks at once, each with its own key; a request whose outcome is unknown is repeated with the same key until PATIENCE is
// over.
export default function () {
  const buyer = exec.scenario.iterationInTest + 1;
  const began = Date.now();
  const reservations = new Set();
  const locations = [];
  if (ARRIVALS) {
    // The number of buyers is not known in advance; there are tickets for all.
    count('I7', 1);
  }
  let open = [];
  for (let click = 1; click <= CLICKS; click++) {
    open.push(`buyer-${buyer}-click-${click}`);
  }
  while (open.length > 0) {
    const sent = Date.now();
    const answers = http.batch(
      open.map((key) => [
        'POST',
        `${sale}/reservations`,
        JSON.stringify({ buyer_id: buyer }),
        { headers: { ...json, 'Idempotency-Key': key }, timeout: `${PATIENCE}s` },
      ]),
    );
    const left = PATIENCE - (Date.now() - began) / 1000;
    let pause = 0.05;
    open = open.filter((_, index) => {
      const answer = answers[index];
      const meaning = classify(answer, buyer);
      requests.add(1);
      unsent.add(isUnsent(answer) ? 1 : 0);
      check(meaning, { 'the contract knows the answer': (it) => !it.unexpected });
      if (meaning.unknown) {
        unknown.add(1);
        pause = Math.max(pause, Number(answer.headers['Retry-After']) || 0);
        if (left > 0) {
          return true;
        }
      }
      const { blocked, connecting, duration } = answer.timings;
      answered.add(sent - began + blocked + connecting + duration);
      if (meaning.reservation) {
        confirmed.add(1);
        reservations.add(meaning.reservation);
      } else if (meaning.location) {
        accepted.add(1);
        locations.push(meaning.location);
      } else if (meaning.refused) {
        refused.add(1);
      } else {
        unfinished(1);
      }
      return false;
    });
    if (open.length > 0) {
      sleep(Math.min(left, pause * (1 + Math.random() / 2)));
    }
  }
  unfinished(follow(locations, began, reservations));
  if (PAYMENT_URL && locations.length > 0) {
    look();
  }
  count('I1', reservations.size);
  count('I3', Math.max(0, reservations.size - 1));
  count('I4', reservations.size);
  count('I5', -reservations.size);
  count('I7', -reservations.size);
}

// Compares the ledger with how the orders ended, until they agree or PATIENCE is over: refunds come after the answers.
function settle(paidBefore, tickets) {
  const deadline = Date.now() + PATIENCE * 1000;
  const before = new Set(paidBefore);
  const ended = new Map();
  for (;;) {
    const paid = new Map();
    for (const { reservation, entry } of ledger().filter((entry) => !before.has(entry.reservation))) {
      const sum = paid.get(reservation) || { charge: 0, refund: 0 };
      sum[entry] += 1;
      paid.set(reservation, sum);
    }
    for (const reservation of paid.keys()) {
      if (!ended.has(reservation)) {
        const read = http.get(`${BASE_URL}/api/reservations/${reservation}`, { tags: { name: 'settle' } });
        // Not every answer is a state: a look-up may fail, and is repeated.
        const status = read.status === 200 ? read.json('status') : 'accepted';
        if (!['accepted', 'held'].includes(status)) {
          ended.set(reservation, status);
        }
      }
    }
    const sums = [...paid];
    const net = sums.map(([reservation, { charge, refund }]) => [ended.get(reservation), charge - refund]);
    // Of an order that never ended, the money may be either way.
    const wrong = net.filter(([status, left]) => (status === undefined ? left < 0 || left > 1 : left !== (status === 'confirmed' ? 1 : 0)));
    const unpaid = Math.max(0, tickets - net.filter(([status]) => status === undefined || status === 'confirmed').length);
    if (wrong.length + unpaid === 0 || Date.now() > deadline) {
      const total = (entry) => sums.reduce((sum, [, of]) => sum + of[entry], 0);
      charges.add(total('charge'));
      refunds.add(total('refund'));
      count('I11', wrong.length + unpaid);
      return;
    }
    sleep(0.5);
  }
}

// All requests are answered: the sale must agree with the answers, and the money with both.
export function teardown({ paidBefore }) {
  const read = http.get(sale);
  if (isUnsent(read)) {
    unsent.add(1);
    return;
  }
  const shown = read.json();
  stock.add(shown.stock);
  reserved.add(shown.reserved);
  count('I2', Math.max(Math.abs(shown.stock + shown.reserved - CAPACITY), -shown.stock));
  count('I4', -shown.reserved);
  count('I5', shown.reserved);
  if (PAYMENT_URL) {
    settle(paidBefore, shown.reserved);
  }
}

export function handleSummary({ metrics }) {
  const value = (name) => (metrics[name] ? metrics[name].values : {});
  const sum = (name) => value(name).count || 0;
  // In a run that is void, this process may have had no socket left to read the sale.
  const isRead = value('stock').value !== undefined;
  const shown = { stock: value('stock').value || 0, reserved: value('reserved').value || 0 };
  const confirmedTotal = sum('oversold') + CAPACITY;
  const most = Math.max(confirmedTotal, value('most_reserved').max || 0);
  const because = {
    I1: `${most} reservations ${most > confirmedTotal ? 'held or confirmed' : 'confirmed'}, of ${CAPACITY} tickets`,
    I2: `the sale says stock ${shown.stock} and ${shown.reserved} reserved, of ${CAPACITY} tickets`,
    I3: `${sum('duplicates')} reservations confirmed beyond the first of a buyer`,
    I4: `the sale says ${shown.reserved} reserved, and ${confirmedTotal} reservations were confirmed to buyers`,
    I5: `the sale says ${shown.reserved} reserved, and ${confirmedTotal} reservations were confirmed to buyers`,
    I7: `${confirmedTotal} sold, and ${sum('iterations')} buyers came for ${CAPACITY} tickets`,
    I10: `${sum('unfinished')} requests never got a final answer`,
    I11: `${sum('unpaid')} reservations are not paid for as they ended`,
  };
  const dropped = sum('dropped_iterations');
  const missed = [
    ...(dropped > 0 ? [`${dropped} of ${BUYERS} buyers could not be sent: all ${VUS} virtual users were busy; more VUS send more`] : []),
    ...(sum('unsent') > 0 ? [`${sum('unsent')} requests never left this process, which had no socket for them; ulimit -n allows more`] : []),
  ];
  const judged = Object.keys(INVARIANTS).filter((code) => isRead || !['I2', 'I4', 'I5'].includes(code));
  const broken = judged.filter((code) => sum(INVARIANTS[code].counter.name) > 0 || (code === 'I1' && sum('overheld') > 0));
  const wait = value('answered');
  const whole = value('completed');
  const summary = {
    requests: sum('requests'),
    confirmed: sum('confirmed'),
    accepted: sum('accepted'),
    refused: sum('refused'),
    unknown: sum('unknown'),
    duplicates: sum('duplicates'),
    capacity: CAPACITY,
    ...shown,
    p50_ms: wait.med,
    p95_ms: wait['p(95)'],
    p99_ms: wait['p(99)'],
    completed: sum('accepted') > 0 && whole.med !== undefined ? { p50_ms: whole.med, p95_ms: whole['p(95)'], p99_ms: whole['p(99)'] } : null,
    payments: PAYMENT_URL && isRead ? { charges: value('charges').value, refunds: value('refunds').value, unpaid: sum('returned') } : null,
    void: missed,
    broken: broken.map((invariant) => ({ invariant, summary: because[invariant] })),
  };
  const three = (trend) => ['med', 'p(95)', 'p(99)'].map((at) => (trend[at] || 0).toFixed(1)).join(' / ');
  const lines = [
    `${summary.confirmed} confirmed, ${summary.accepted} accepted, ${summary.refused} refused, ${summary.unknown} unknown; stock ${shown.stock}, ${shown.reserved} reserved of ${CAPACITY}`,
    `answered, p50 / p95 / p99: ${three(wait)} ms (${ARRIVALS ? `open loop at ${RATE}/s` : 'closed loop: what a stall held back is missing'})`,
    ...(summary.completed ? [`completed, p50 / p95 / p99: ${three(whole)} ms`] : []),
    ...(summary.payments
      ? [`payments: ${summary.payments.charges} charged, ${summary.payments.refunds} refunded; ${summary.payments.unpaid} orders ended unpaid`]
      : []),
    ...missed.map((why) => `VOID: ${why}`),
    ...broken.map((code) => `BROKEN ${code} (${INVARIANTS[code].title}): ${because[code]}`),
  ];
  const files = { stdout: `${lines.join('\n')}\n` };
  if (__ENV.SUMMARY) {
    files[__ENV.SUMMARY] = JSON.stringify(summary);
  }
  return files;
}
