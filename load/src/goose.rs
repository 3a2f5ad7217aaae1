//! The rush as a Goose scenario: a Goose user for each click, all of which wait at a gate until the last is connected.
//! They share one HTTP client with a connection for each user: to make a client for each would take most of the time.
//!
//! Goose is a closed loop: a user sends nothing while it waits for an answer. For the first requests of a rush that is realistic. Repeats
//! suffer from coordinated omission: a server that stalls holds back the requests that would have met the stall, so they are missing from
//! the percentiles. Goose's mitigation is off here. `k6` with `SCENARIO=arrivals` is an open loop.

use std::{
    error::Error,
    io, iter,
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{anyhow, bail, ensure};
use box_office::{
    BuyerId, Priority, SaleId,
    api::{NewReservation, Sale},
    trace::now_monotonic_us,
};
use goose::{
    GooseAttack,
    client::GooseClientBuilder,
    config::GooseConfiguration,
    goose::{GooseMethod, GooseRequest, GooseUser, Scenario, Transaction, TransactionFunction},
};
use harness::{
    history::{Answer, Ending, FORMAT_VERSION, Header, History, Micros, Refused, Request},
    rush::{
        Classified, Clock, HttpResponse, Report, classify, final_state, is_event_stream, jittered, recheck, retry_after,
    },
};
use tokio::{
    sync::{Barrier, mpsc, watch},
    time::{sleep, timeout},
};

use crate::{
    Rush,
    outcome::{Outcome, Seen},
    payments::Ledger,
};

/// Users that Goose starts per second. They wait at the gate, so this determines only how long the start takes.
const USERS_A_SECOND: u32 = 1000;

/// A user has a connection, and each has a file descriptor at both ends.
const MAX_USERS: usize = 10_000;

/// Retries within a request are visible only in the server's metrics.
const UNKNOWN_RETRIES: u64 = 0;

/// Before a repeat without a `Retry-After`.
const REPEAT_PAUSE: Duration = Duration::from_millis(50);

/// Between two polls of an accepted order, where there are no events: doubled each time up to the maximum, so that polling does not slow
/// the server down.
const POLL_PAUSE: Duration = Duration::from_millis(20);
const MAX_POLL_PAUSE: Duration = Duration::from_millis(250);

/// State shared by all users.
struct SharedRush {
    sale: SaleId,
    patience: Duration,
    clicks: Vec<(BuyerId, u32)>,
    /// The index of the next click without a user.
    next: AtomicUsize,
    /// Requests that failed in this process, before they reached the network.
    unsent: AtomicUsize,
    /// The most reservations with a ticket, held or confirmed, that a buyer has seen the sale have. `None`: buyers do not look.
    most_reserved: Option<AtomicI64>,
    gathered: Barrier,
    connected: Barrier,
    /// When the gate opened; `None` before.
    opened: watch::Receiver<Option<Micros>>,
    done: mpsc::UnboundedSender<Vec<Request>>,
}

/// Creates the sale, sends the rush, reads the sale, and checks the history.
pub(crate) async fn run(rush: &Rush) -> anyhow::Result<Outcome> {
    let clicks: Vec<_> = rush.clicks().collect();
    let users = clicks.len();
    ensure!(
        users <= MAX_USERS,
        "{users} requests at once are too many: --buyers times --clicks is at most {MAX_USERS}"
    );
    let ledger = match &rush.payments {
        Some(service) => Some(Ledger::open(service).await?),
        None => None,
    };
    rush.host.open(rush.sale, rush.size.capacity, &rush.admin_token).await?;

    let (open, opened) = watch::channel(None);
    let (done, mut answers) = mpsc::unbounded_channel();
    let shared = Arc::new(SharedRush {
        sale: rush.sale,
        patience: rush.size.patience(),
        clicks,
        next: AtomicUsize::new(0),
        unsent: AtomicUsize::new(0),
        most_reserved: rush.payments.is_some().then(AtomicI64::default),
        gathered: Barrier::new(users),
        connected: Barrier::new(users + 1),
        opened,
        done,
    });
    let mut attack = tokio::spawn(attack(&rush.host.to_string(), users, &shared)?.execute());

    tokio::select! {
        _ = shared.connected.wait() => {}
        ended = &mut attack => match ended? {
            Ok(_) => bail!("Goose ended before its users were there"),
            Err(error) => bail!("Goose did not start: {error}"),
        },
    }
    let clock = Clock::start();
    let opened_us = now_monotonic_us();
    open.send_replace(Some(opened_us));
    let mut requests = vec![];
    for _ in 0..users {
        tokio::select! {
            biased;
            Some(answered) = answers.recv() => requests.extend(answered),
            _ = &mut attack => bail!("Goose ended before all of its users did"),
        }
    }
    let clock = clock.stop();
    attack
        .await?
        .map_err(|error| anyhow!("Goose did not end well: {error}"))?;

    requests.sort_by_key(|request| (request.sent_us, request.request));
    recheck(&mut requests, rush.host.address().await?, opened_us).await;
    let ended = Instant::now();
    let sale = loop {
        match rush.host.sale(rush.sale).await {
            // Goose's connections are still closing, and hold every file that this process may open.
            Err(error) if is_unsent(&*error) && ended.elapsed() < rush.size.patience() => sleep(REPEAT_PAUSE).await,
            read => break read?,
        }
    };
    let history = History {
        header: Header {
            version: FORMAT_VERSION,
            strategy: rush.name.clone(),
            sale: rush.sale,
            capacity: rush.size.capacity.into(),
            deadline_us: u64::try_from(rush.size.patience().as_micros())?,
            expiry_us: rush
                .expiry
                .map(|expiry| u64::try_from(expiry.as_micros()))
                .transpose()?,
            stock: Some(sale.stock),
        },
        requests,
        // Clients see no rows.
        rows: None,
        faults: vec![],
        payments: None,
        decisions: None,
    };
    let money = match ledger {
        Some(ledger) => Some(ledger.compare(&history, rush.size.patience()).await?),
        None => None,
    };
    let void = match shared.unsent.load(Ordering::Relaxed) {
        0 => vec![],
        unsent => vec![format!(
            "{unsent} requests never left this process, which had no socket for them: fewer --buyers, or a higher limit (ulimit -n)"
        )],
    };
    let report = Report::new(1, history, UNKNOWN_RETRIES, &clock);
    let most_reserved = shared.most_reserved.as_ref().map(|most| most.load(Ordering::Relaxed));
    let seen = Seen {
        sale,
        most_reserved,
        money,
    };
    Ok(Outcome::of_goose(rush, &report, &seen, void))
}

fn attack(host: &str, users: usize, shared: &Arc<SharedRush>) -> anyhow::Result<GooseAttack> {
    let mut configuration = GooseConfiguration::default();
    configuration.host = Some(host.to_owned());
    configuration.users = Some(users);
    configuration.increase_rate = Some(USERS_A_SECOND.to_string());
    configuration.iterations = Some(1);
    configuration.no_telnet = true;
    // Goose resets its metrics once all users have started, which may be after the gate opened: the harness measures instead.
    configuration.no_metrics = true;
    configuration.quiet = 1;

    let patience = shared.patience;
    let shared = Arc::clone(shared);
    let visit: TransactionFunction = Arc::new(move |user| {
        let shared = Arc::clone(&shared);
        Box::pin(async move {
            let requests = shared.click(user).await;
            // The receiver is gone once the attack was aborted.
            let _ = shared.done.send(requests);
            Ok(())
        })
    });
    let scenario = Scenario::new("rush").register_transaction(Transaction::new(visit));
    let client = GooseClientBuilder::new().without_cookies().timeout(patience);
    Ok(GooseAttack::initialize_with_config(configuration)?
        .set_client_builder_without_cookies(client)?
        .register_scenario(scenario))
}

impl SharedRush {
    /// One click: connects, waits at the gate for all others, sends the request, and repeats it while the outcome is unknown and time is
    /// left.
    async fn click(&self, user: &mut GooseUser) -> Vec<Request> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let (buyer, click) = self.clicks[number];
        let key = format!("buyer-{buyer}-click-{click}");
        self.gathered.wait().await;
        // All at once, so that each user has a connection before the gate opens, and the server's pool is warm. Without a server the first
        // request fails.
        let _ = user.get("/readyz").await;
        self.connected.wait().await;
        let mut opened = self.opened.clone();
        let Ok(Some(opened_us)) = opened.wait_for(Option::is_some).await.map(|opened| *opened) else {
            return vec![]; // The rush was aborted before it began.
        };

        let mut requests: Vec<Request> = vec![];
        loop {
            let sent_us = now_monotonic_us() - opened_us;
            let mut request = Request {
                request: (number + requests.len() * 1_000_000) as u64,
                buyer,
                key: key.clone(),
                sent_us,
                answered_us: None,
                answer: Answer::Indeterminate,
                steps: vec![],
            };
            let mut pause = REPEAT_PAUSE;
            if let Some(answered) = self.reserve(user, &request).await {
                request.answered_us = Some(now_monotonic_us() - opened_us);
                pause = retry_after(&answered.headers).unwrap_or(REPEAT_PAUSE);
                request.answer = match classify(&answered) {
                    Classified::Final(answer) => answer,
                    Classified::Accepted { reservation, location } => {
                        let followed = timeout(self.patience, self.follow(user, &location, opened_us)).await;
                        self.look(user).await;
                        Answer::Accepted {
                            reservation,
                            ending: followed.ok(),
                        }
                    }
                };
            }
            let unknown = matches!(
                request.answer,
                Answer::Indeterminate | Answer::Refused(Refused::RateLimited)
            );
            requests.push(request);
            let spent = Duration::from_micros(now_monotonic_us() - opened_us - requests[0].sent_us);
            let left = self.patience.saturating_sub(spent);
            if !unknown || left.is_zero() {
                return requests;
            }
            sleep(jittered(pause).min(left)).await;
        }
    }

    /// Waits for the event with the final state of an accepted order. Where there are no events, polls until its state is final.
    async fn follow(&self, user: &mut GooseUser, location: &str, opened_us: Micros) -> Ending {
        let events = format!("{location}/events");
        let mut path = events.as_str();
        let mut pause = POLL_PAUSE;
        loop {
            let ready = GooseRequest::builder()
                .method(GooseMethod::Get)
                .name("follow")
                .path(path)
                .build();
            let state = self.send(user, ready).await;
            if state.as_ref().is_some_and(|answered| !is_event_stream(answered)) {
                path = location;
            }
            if let Some(refused) = state.as_ref().and_then(final_state) {
                return Ending {
                    at_us: now_monotonic_us() - opened_us,
                    refused,
                    changed_to: None,
                };
            }
            sleep(jittered(pause)).await;
            pause = (pause * 2).min(MAX_POLL_PAUSE);
        }
    }

    /// Reads the sale, if its tickets are held until they are paid for: those must never be too many, and in the end all are confirmed or
    /// back.
    async fn look(&self, user: &mut GooseUser) {
        let Some(most_reserved) = &self.most_reserved else {
            return;
        };
        let path = format!("/api/sales/{}", self.sale);
        let ready = GooseRequest::builder()
            .method(GooseMethod::Get)
            .name("look")
            .path(path.as_str())
            .build();
        let answered = self.send(user, ready).await;
        let sale = answered.and_then(|answered| serde_json::from_slice::<Sale>(&answered.body).ok());
        if let Some(Sale { reserved, .. }) = sale {
            most_reserved.fetch_max(reserved, Ordering::Relaxed);
        }
    }

    /// Sends an order through Goose. `None` without an answer.
    async fn reserve(&self, user: &mut GooseUser, request: &Request) -> Option<HttpResponse> {
        let path = format!("/api/sales/{}/reservations", self.sale);
        let order = NewReservation {
            buyer_id: request.buyer,
            priority: Priority::Normal,
        };
        let builder = user
            .get_request_builder(&GooseMethod::Post, &path)
            .ok()?
            .header("idempotency-key", &request.key)
            .header("x-request-id", request.request.to_string())
            .json(&order);
        let ready = GooseRequest::builder()
            .name("reserve")
            .set_request_builder(builder)
            .build();
        self.send(user, ready).await
    }

    /// Sends a request through Goose. `None` without an answer.
    async fn send(&self, user: &mut GooseUser, request: GooseRequest<'_>) -> Option<HttpResponse> {
        let response = user.request(request).await.ok()?.response;
        let response = response
            .inspect_err(|error| {
                self.unsent.fetch_add(usize::from(is_unsent(error)), Ordering::Relaxed);
            })
            .ok()?;
        Some(HttpResponse {
            status: response.status(),
            headers: response.headers().clone(),
            body: response.bytes().await.ok()?,
        })
    }
}

/// Whether this process had no file or no port left for a socket: the server never heard of the request.
fn is_unsent(error: &(dyn Error + 'static)) -> bool {
    /// Too many open files in the system, and in this process.
    const NO_FILE: [i32; 2] = [23, 24];

    let mut causes = iter::successors(Some(error), |&error| error.source());
    causes.any(|cause| {
        cause.downcast_ref::<io::Error>().is_some_and(|cause| {
            let no_file = cause.raw_os_error().is_some_and(|code| NO_FILE.contains(&code));
            no_file || cause.kind() == io::ErrorKind::AddrNotAvailable
        })
    })
}
