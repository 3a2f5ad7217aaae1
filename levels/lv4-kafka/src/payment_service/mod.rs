//! A payment service that misbehaves on demand: the counterpart of LV.4's saga, for the suite and
//! for trials.
//!
//! - `POST /charges` takes the price of a ticket. The header `Idempotency-Key` makes a repeat
//!   harmless: it gets the first answer again. Without the header each request is another charge.
//! - `POST /refunds` returns what was taken under this key. It is the last word: a charge that
//!   arrives after it is declined. While the charge is being processed the answer is 409.
//! - `PUT /behaviours/{buyer}` chooses how the charges of a buyer are treated. For all other buyers
//!   `--behave` and `--seed` choose.
//! - `GET /ledger` lists the charges and refunds; `GET /calls` counts the requests for a charge;
//!   `GET /flooded` counts the bytes of the answers that are floods.
//!
//! With `--ledger` it keeps its promises about money as well as a bank's does: what it has taken or
//! returned is in that file before it answers. It is a tool for tests and has no authentication.

mod behaviour;
mod ledger;

use std::{
    collections::HashMap,
    convert::Infallible,
    io::Write,
    net::SocketAddr,
    path::PathBuf,
    process,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use anyhow::Context;
use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{Path, State},
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
    routing::{get, post, put},
};
use clap::{Args, ValueEnum};
use futures_util::stream;
use serde::Deserialize;
use serde_json::json;
use tokio::net::TcpListener;
use uuid::Uuid;

pub use behaviour::{Behaviour, Mix};

use self::{
    behaviour::Behaviours,
    ledger::{Entry, Ledger, StillProcessing},
};

/// The exit code of a service that dies on demand.
const DEATH: i32 = 9;

/// The size of a huge answer, in bytes.
const HUGE: usize = 10_000_000;

/// What a flood sends again and again.
static CHUNK: [u8; 64 * 1024] = [b' '; 64 * 1024];

/// The arguments of the payment service.
#[derive(Args)]
pub struct PaymentServiceArgs {
    /// The address to listen on; port 0 is any free one
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// How often each behaviour is chosen
    #[arg(long, value_name = "NAME=WEIGHT,…", default_value = "approve")]
    behave: Mix,
    /// The seed of the choice: a buyer gets the same behaviour in every run
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// How long a late answer takes, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 3000)]
    late_ms: u64,
    /// The file of the ledger; without one, the ledger ends with the process
    #[arg(long, value_name = "FILE")]
    ledger: Option<PathBuf>,
}

struct Service {
    behaviours: Mutex<Behaviours>,
    ledger: Mutex<Ledger>,
    late: Duration,
    /// The bytes that floods have sent.
    flooded: AtomicU64,
}

/// The body of a charge and of a refund.
#[derive(Deserialize)]
struct Payment {
    reservation: Uuid,
    #[serde(default)]
    buyer: i64,
}

/// Serves until the process ends. It prints its URL first.
///
/// # Errors
/// If the ledger cannot be opened, or the address cannot be listened on.
pub async fn serve(arguments: PaymentServiceArgs) -> anyhow::Result<()> {
    let ledger = arguments.ledger.as_deref().map(Ledger::open).transpose()?;
    let service = Arc::new(Service {
        behaviours: Mutex::new(Behaviours {
            mix: arguments.behave,
            seed: arguments.seed,
            set: HashMap::new(),
        }),
        ledger: Mutex::new(ledger.unwrap_or_default()),
        late: Duration::from_millis(arguments.late_ms),
        flooded: AtomicU64::new(0),
    });
    let router = Router::new()
        .route("/charges", post(charge))
        .route("/refunds", post(refund))
        .route("/behaviours/{buyer}", put(behave))
        .route("/ledger", get(list))
        .route("/calls", get(calls))
        .route("/flooded", get(flooded))
        .with_state(service);
    let listener = TcpListener::bind(arguments.listen)
        .await
        .with_context(|| format!("listening on {}", arguments.listen))?;
    // Stdout may be closed; the service serves all the same.
    let _ = writeln!(std::io::stdout(), "payments at http://{}", listener.local_addr()?);
    Ok(axum::serve(listener, router).await?)
}

impl Service {
    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn behaviours(&self) -> MutexGuard<'_, Behaviours> {
        self.behaviours.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn charge(State(service): State<Arc<Service>>, headers: HeaderMap, Json(payment): Json<Payment>) -> Response {
    let key = idempotency_key(&headers);
    let behaviour = service.behaviours().of(payment.buyer);
    let is_first = {
        let mut ledger = service.ledger();
        ledger.calls += 1;
        ledger.earlier(key).is_none()
    };
    let wanted = match behaviour {
        Behaviour::Hang if is_first => return std::future::pending().await,
        Behaviour::Decline => Entry::Declined,
        _ => Entry::Charge,
    };
    if behaviour == Behaviour::TakeLate && is_first {
        service.ledger().begin(key);
        // In a task of its own: the money is taken although the client has gone.
        let (service, key) = (Arc::clone(&service), key.map(str::to_owned));
        let taking = tokio::spawn(async move {
            tokio::time::sleep(service.late).await;
            service.ledger().charge(key.as_deref(), payment.reservation, wanted)
        });
        return match taking.await {
            Ok(Ok(entry)) => answer(entry),
            _ => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
        };
    }
    let entry = match service.ledger().charge(key, payment.reservation, wanted) {
        Ok(entry) => entry,
        Err(_) => return StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    };
    match behaviour {
        Behaviour::AnswerLate if is_first => {
            tokio::time::sleep(service.late).await;
            answer(entry)
        }
        Behaviour::Twice if is_first => format!("{0}{0}", status(entry)).into_response(),
        Behaviour::Die if is_first => process::exit(DEATH),
        Behaviour::Fail => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
        Behaviour::Garbage => "<html><body>approved</body></html>".into_response(),
        Behaviour::Huge => vec![b' '; HUGE].into_response(),
        Behaviour::Endless => {
            let spaces = stream::repeat_with(|| Ok::<_, Infallible>(Bytes::from_static(b" ")));
            let slow = futures_util::StreamExt::then(spaces, async |space| {
                tokio::time::sleep(Duration::from_millis(10)).await;
                space
            });
            Body::from_stream(slow).into_response()
        }
        // The server asks for a chunk once the one before it is sent.
        Behaviour::Flood => {
            let chunks = stream::repeat_with(move || {
                service.flooded.fetch_add(CHUNK.len() as u64, Relaxed);
                Ok::<_, Infallible>(Bytes::from_static(&CHUNK))
            });
            Body::from_stream(chunks).into_response()
        }
        _ => answer(entry),
    }
}

async fn refund(State(service): State<Arc<Service>>, headers: HeaderMap, Json(payment): Json<Payment>) -> Response {
    match service.ledger().refund(idempotency_key(&headers), payment.reservation) {
        Ok(Ok(_)) => Json(json!({"status": "refunded"})).into_response(),
        Ok(Err(StillProcessing)) => (StatusCode::CONFLICT, Json(json!({"status": "processing"}))).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

async fn behave(State(service): State<Arc<Service>>, Path(buyer): Path<i64>, name: String) -> Response {
    match Behaviour::from_str(&name, false) {
        Ok(behaviour) => {
            service.behaviours().set.insert(buyer, behaviour);
            StatusCode::NO_CONTENT.into_response()
        }
        Err(why) => (StatusCode::UNPROCESSABLE_ENTITY, why).into_response(),
    }
}

async fn list(State(service): State<Arc<Service>>) -> Response {
    Json(json!(service.ledger().entries())).into_response()
}

async fn calls(State(service): State<Arc<Service>>) -> String {
    service.ledger().calls.to_string()
}

async fn flooded(State(service): State<Arc<Service>>) -> String {
    service.flooded.load(Relaxed).to_string()
}

fn idempotency_key(headers: &HeaderMap) -> Option<&str> {
    headers.get("idempotency-key")?.to_str().ok()
}

fn status(entry: Entry) -> serde_json::Value {
    match entry {
        Entry::Charge => json!({"status": "approved"}),
        _ => json!({"status": "declined"}),
    }
}

fn answer(entry: Entry) -> Response {
    Json(status(entry)).into_response()
}
