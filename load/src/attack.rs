//! The rush as a Goose scenario: a Goose user for each click, all held at a gate until the last of them is there and connected.
//! They share one HTTP client, which opens a connection for each: with a client each, most of the time would go into making clients.
//!
//! Goose is a closed loop: whoever waits for an answer sends nothing meanwhile. In the first instant of a rush that is what happens in life
//! too. Repeats are another matter: a server that stalls holds back the requests that would have met the stall, so they are missing from the
//! percentiles (coordinated omission), and Goose's mitigation is off here. `k6` with `SCENARIO=arrivals` is an open loop.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::{anyhow, bail, ensure};
use box_office::{BuyerId, SaleId, api::NewReservation, trace::now_monotonic_us};
use goose::{
    GooseAttack,
    client::GooseClientBuilder,
    config::GooseConfiguration,
    goose::{GooseMethod, GooseRequest, GooseUser, Scenario, Transaction, TransactionFunction},
};
use harness::{
    history::{Answer, Ending, FORMAT_VERSION, Header, History, Micros, Request},
    rush::{
        Classified, Clock, HttpResponse, Report, classify, final_state, is_event_stream, jittered, recheck, retry_after,
    },
};
use tokio::{
    sync::{Barrier, mpsc, watch},
    time::{sleep, timeout},
};

use crate::{Rush, outcome::Outcome};

/// How many users Goose starts in a second. They wait at the gate, so this decides only how long the gathering takes.
const USERS_A_SECOND: u32 = 1000;

/// A connection for each, at both ends.
const MOST_USERS: usize = 10_000;

/// What a strategy tries again within one request, only the server's own metrics tell.
const NOT_COUNTED: u64 = 0;

/// Before a repeat that the server gives no time for.
const PAUSE: Duration = Duration::from_millis(50);

/// Between two looks at an accepted order, where there are no events: longer each time, so that those who wait don't keep the server from
/// deciding.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_millis(250);

/// What every user of the attack shares.
struct Shop {
    sale: SaleId,
    patience: Duration,
    clicks: Vec<(BuyerId, u32)>,
    /// The next click that has nobody yet.
    next: AtomicUsize,
    gathered: Barrier,
    connected: Barrier,
    /// When the gate opened; `None` before.
    opened: watch::Receiver<Option<Micros>>,
    done: mpsc::UnboundedSender<Vec<Request>>,
}

/// Opens the sale, sends the rush, looks at the sale, and judges.
pub(crate) async fn run(rush: &Rush) -> anyhow::Result<Outcome> {
    let clicks: Vec<_> = rush.clicks().collect();
    let users = clicks.len();
    ensure!(
        users <= MOST_USERS,
        "{users} requests at once are too many: --buyers times --clicks is at most {MOST_USERS}"
    );
    rush.host
        .open(rush.sale, rush.crowd.capacity, &rush.admin_token)
        .await?;

    let (open, opened) = watch::channel(None);
    let (done, mut answers) = mpsc::unbounded_channel();
    let shop = Arc::new(Shop {
        sale: rush.sale,
        patience: rush.crowd.patience(),
        clicks,
        next: AtomicUsize::new(0),
        gathered: Barrier::new(users),
        connected: Barrier::new(users + 1),
        opened,
        done,
    });
    let mut attack = tokio::spawn(attack(&rush.host.to_string(), users, &shop)?.execute());

    tokio::select! {
        _ = shop.connected.wait() => {}
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
    let sale = rush.host.sale(rush.sale).await?;
    let history = History {
        header: Header {
            version: FORMAT_VERSION,
            strategy: rush.name.clone(),
            sale: rush.sale,
            capacity: rush.crowd.capacity.into(),
            deadline_us: u64::try_from(rush.crowd.patience().as_micros())?,
            expiry_us: None,
            stock: Some(sale.stock),
        },
        requests,
        // A client sees none.
        rows: None,
        faults: vec![],
    };
    Ok(Outcome::of_goose(
        rush,
        &Report::new(1, history, NOT_COUNTED, &clock),
        &sale,
    ))
}

fn attack(host: &str, users: usize, shop: &Arc<Shop>) -> anyhow::Result<GooseAttack> {
    let mut configuration = GooseConfiguration::default();
    configuration.host = Some(host.to_owned());
    configuration.users = Some(users);
    configuration.increase_rate = Some(USERS_A_SECOND.to_string());
    configuration.iterations = Some(1);
    configuration.no_telnet = true;
    // Goose clears its figures once all users are there, which may be after the gate opened: the suite's own are used.
    configuration.no_metrics = true;
    configuration.quiet = 1;

    let patience = shop.patience;
    let shop = Arc::clone(shop);
    let visit: TransactionFunction = Arc::new(move |user| {
        let shop = Arc::clone(&shop);
        Box::pin(async move {
            let requests = shop.visit(user).await;
            // Nobody listens once the attack was given up.
            let _ = shop.done.send(requests);
            Ok(())
        })
    });
    let scenario = Scenario::new("rush").register_transaction(Transaction::new(visit));
    let client = GooseClientBuilder::new().without_cookies().timeout(patience);
    Ok(GooseAttack::initialize_with_config(configuration)?
        .set_client_builder_without_cookies(client)?
        .register_scenario(scenario))
}

impl Shop {
    /// One click: comes, waits at the gate with everybody else, asks, and repeats what stays undecided until the patience runs out.
    async fn visit(&self, user: &mut GooseUser) -> Vec<Request> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let (buyer, click) = self.clicks[number];
        let key = format!("buyer-{buyer}-click-{click}");
        self.gathered.wait().await;
        // All at once, so that there is a connection for each before the gate opens; and the server's pool is warm. If there is no server,
        // the first request shows it.
        let _ = user.get("/readyz").await;
        self.connected.wait().await;
        let mut opened = self.opened.clone();
        let Ok(Some(opened_us)) = opened.wait_for(Option::is_some).await.map(|opened| *opened) else {
            return vec![]; // The rush was given up before it began.
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
            let mut pause = PAUSE;
            if let Some(answered) = self.ask(user, &request).await {
                request.answered_us = Some(now_monotonic_us() - opened_us);
                pause = retry_after(&answered.headers).unwrap_or(PAUSE);
                request.answer = match classify(&answered) {
                    Classified::Final(answer) => answer,
                    Classified::Accepted { reservation, location } => Answer::Accepted {
                        reservation,
                        ending: timeout(self.patience, self.follow(user, &location, opened_us))
                            .await
                            .ok(),
                    },
                };
            }
            let undecided = request.answer == Answer::Indeterminate;
            requests.push(request);
            let spent = Duration::from_micros(now_monotonic_us() - opened_us - requests[0].sent_us);
            let left = self.patience.saturating_sub(spent);
            if !undecided || left.is_zero() {
                return requests;
            }
            sleep(jittered(pause).min(left)).await;
        }
    }

    /// Waits for the event that tells how an accepted order ended. Where there are no events, asks for its state until it is final.
    async fn follow(&self, user: &mut GooseUser, location: &str, opened_us: Micros) -> Ending {
        let events = format!("{location}/events");
        let mut path = events.as_str();
        let mut pause = LOOK_AGAIN;
        loop {
            let ready = GooseRequest::builder()
                .method(GooseMethod::Get)
                .name("follow")
                .path(path)
                .build();
            let state = send(user, ready).await;
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
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Sends an order through Goose. `None`: no answer came.
    async fn ask(&self, user: &mut GooseUser, request: &Request) -> Option<HttpResponse> {
        let path = format!("/api/sales/{}/reservations", self.sale);
        let order = NewReservation {
            buyer_id: request.buyer,
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
        send(user, ready).await
    }
}

/// Sends a request through Goose. `None`: no answer came.
async fn send(user: &mut GooseUser, request: GooseRequest<'_>) -> Option<HttpResponse> {
    let response = user.request(request).await.ok()?.response.ok()?;
    Some(HttpResponse {
        status: response.status(),
        headers: response.headers().clone(),
        body: response.bytes().await.ok()?,
    })
}
