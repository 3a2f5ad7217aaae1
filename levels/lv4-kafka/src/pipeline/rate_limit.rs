//! Rate limiting: a request over the limit is answered 429 before its order is accepted.
//!
//! A flood costs a look-up in a table here, not a message and a decision there: once an order is
//! accepted, it has to be decided. `RATE_LIMIT_PER_BUYER` bounds one buyer, `RATE_LIMIT` all of
//! them together. Each is a GCRA, a token bucket in one number: of a limit of *n*, *n* requests may
//! come at once, and then *n* a second.
//!
//! Guarantee: in any *t* seconds an instance lets at most *n* + *n·t* new orders pass. Over the limit
//! nothing happens to the order: a 429 says nothing about the stock, and the same key may come
//! again. A repeat of an order that this instance has accepted is answered 202 whatever the limit, as
//! long as it is among the last [`MAX_ACCEPTED`]; and so is one whose order is decided, on any
//! instance and after a restart, because its row says so.
//!
//! Limits:
//! - Each instance counts for itself: *k* instances behind a balancer let *k* times as much pass.
//! - A repeat is taken for a new request if its order is not decided yet and was accepted by
//!   another instance or before a restart: nothing but the message in Kafka knows of it. If it is
//!   over the limit then, it is answered 429, and its order is decided all the same.
//! - The rows are read only for requests over the limit, at most [`MAX_LOOKUPS`] times a second and
//!   a tenth of that for one buyer, or the look-up would be what a flood attacks. Over that, a
//!   repeat is answered 429 as well, until a limit lets it pass.
//! - The memory is bounded: [`MAX_BUYERS`] buyers and [`MAX_ACCEPTED`] ids. A buyer who has sent
//!   nothing for as long as the bucket takes to refill is forgotten without loss. If more buyers
//!   than that are active at once, those who come on top are held to the limit of all only. To
//!   refuse them would let whoever invents buyers lock out the real ones.
//! - The buyer's id is what the request says. Where buyers log in, it is the account's.
//!
//! Cost: two locks in this process and up to two look-ups for each order; about 10 MB when both
//! tables are full.
//!
//! Sources: ITU-T I.371, annex A (GCRA); crate `governor`; IETF draft *RateLimit header fields for
//! HTTP* (draft-ietf-httpapi-ratelimit-headers-10). Book: LV.4, "Rate limiting".

use std::{
    collections::{HashMap, HashSet, VecDeque},
    num::NonZeroU32,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use box_office::{
    BuyerId, Database, Order, RateLimitBuyers, RateLimitPolicy, RateLimited, RateLimitedRequests, ReserveError,
    StrategyMetrics,
};
use governor::{
    Quota, RateLimiter,
    clock::{Clock, DefaultClock},
    nanos::Nanos,
    state::{InMemoryState, NotKeyed, StateStore},
};
use uuid::Uuid;

/// The maximum number of buyers that are counted one by one.
pub const MAX_BUYERS: usize = 100_000;

/// The number of accepted orders whose repeats are recognised without a look-up.
pub const MAX_ACCEPTED: usize = 100_000;

/// The maximum number of look-ups of rows a second.
pub const MAX_LOOKUPS: NonZeroU32 = NonZeroU32::new(50).expect("not 0");

/// The maximum number of look-ups of rows a second for the requests of one buyer.
const MAX_LOOKUPS_PER_BUYER: NonZeroU32 = NonZeroU32::new(5).expect("not 0");

/// The interval between two searches for buyers that can be forgotten: each reads the whole table.
const SWEEP_INTERVAL: Nanos = Nanos::new(100_000_000);

/// The names of the policies in `RateLimit-Policy`, and of their scopes in the metric.
const BUYER: &str = "buyer";
const OVERALL: &str = "overall";

/// What a request is, if it may pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// An order that is not known to be accepted.
    New,
    /// A repeat of an accepted order: it needs no other message.
    Repeat,
}

/// The rate limits of one instance.
pub struct RateLimit {
    per_buyer: Option<PerBuyer>,
    overall: Option<Overall>,
    policies: Vec<RateLimitPolicy>,
    accepted: Mutex<RecentIds>,
    lookups: Overall,
    lookups_per_buyer: PerBuyer,
    database: Database,
    limited: RateLimitedRequests,
}

/// One limit for all requests.
struct Overall(RateLimiter<NotKeyed, InMemoryState, DefaultClock>);

/// One limit for each buyer.
struct PerBuyer(RateLimiter<BuyerId, BuyerStates, DefaultClock>);

impl RateLimit {
    /// Creates the limits, in requests a second. `None`: neither is set.
    pub fn new(
        per_buyer: Option<NonZeroU32>,
        overall: Option<NonZeroU32>,
        database: Database,
        metrics: &StrategyMetrics,
    ) -> Option<Self> {
        let policy = |name, quota: Option<NonZeroU32>| quota.map(|quota| RateLimitPolicy { name, quota });
        let policies: Vec<_> = [policy(BUYER, per_buyer), policy(OVERALL, overall)]
            .into_iter()
            .flatten()
            .collect();
        (!policies.is_empty()).then(|| Self {
            per_buyer: per_buyer.map(|quota| PerBuyer::new(quota, metrics.rate_limit_buyers.clone())),
            overall: overall.map(Overall::new),
            policies,
            accepted: Mutex::default(),
            lookups: Overall::new(MAX_LOOKUPS),
            lookups_per_buyer: PerBuyer::new(MAX_LOOKUPS_PER_BUYER, RateLimitBuyers::default()),
            database,
            limited: metrics.rate_limited.clone(),
        })
    }

    // ANCHOR: admit
    /// Whether the order with this id may be accepted.
    ///
    /// # Errors
    /// [`ReserveError::RateLimited`] if a limit is exceeded and the request is not known to be a
    /// repeat of an accepted order; [`ReserveError::Indeterminate`] if that could not be read.
    pub async fn admit(&self, order: &Order, id: Uuid) -> Result<Admission, ReserveError> {
        if self.accepted().contains(id) {
            return Ok(Admission::Repeat);
        }
        let Err(limited) = self.check(order.buyer) else {
            return Ok(Admission::New);
        };
        if self.is_decided(order.buyer, id).await? {
            self.remember(id);
            return Ok(Admission::Repeat);
        }
        self.limited.count(limited.exceeded);
        Err(limited.into())
    }

    /// The buyer's limit first: what it stops does not use up the limit of all.
    fn check(&self, buyer: BuyerId) -> Result<(), RateLimited> {
        let exceeded = |exceeded| {
            move |retry_after| RateLimited {
                exceeded,
                policies: self.policies.clone(),
                retry_after,
            }
        };
        if let Some(per_buyer) = &self.per_buyer {
            per_buyer.check(buyer).map_err(exceeded(BUYER))?;
        }
        if let Some(overall) = &self.overall {
            overall.check().map_err(exceeded(OVERALL))?;
        }
        Ok(())
    }
    // ANCHOR_END: admit

    /// Remembers an order that the broker has acknowledged.
    pub fn remember(&self, id: Uuid) {
        self.accepted().insert(id);
    }

    /// Whether the order has a row, as far as the look-ups are not used up.
    async fn is_decided(&self, buyer: BuyerId, id: Uuid) -> Result<bool, ReserveError> {
        if self.lookups_per_buyer.check(buyer).is_err() || self.lookups.check().is_err() {
            return Ok(false);
        }
        let decided = sqlx::query_scalar("select exists (select from reservation where id = $1)")
            .bind(id)
            .fetch_one(&self.database)
            .await?;
        Ok(decided)
    }

    fn accepted(&self) -> MutexGuard<'_, RecentIds> {
        self.accepted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Overall {
    /// A limit in requests a second.
    fn new(quota: NonZeroU32) -> Self {
        Self(RateLimiter::direct(Quota::per_second(quota)))
    }

    /// Lets one request pass, or says when the next may.
    fn check(&self) -> Result<(), Duration> {
        let checked = self.0.check();
        checked.map_err(|until| until.wait_time_from(self.0.clock().now()))
    }
}

impl PerBuyer {
    /// A limit in requests a second. The gauge has the number of buyers in the table.
    fn new(quota: NonZeroU32, buyers: RateLimitBuyers) -> Self {
        let quota = Quota::per_second(quota);
        let states = BuyerStates {
            interval: quota.replenish_interval().into(),
            states: Arc::default(),
            buyers,
        };
        Self(RateLimiter::new(quota, states, DefaultClock::default()))
    }

    /// Lets one request of this buyer pass, or says when the next may.
    fn check(&self, buyer: BuyerId) -> Result<(), Duration> {
        let checked = self.0.check_key(&buyer);
        checked.map_err(|until| until.wait_time_from(self.0.clock().now()))
    }
}

/// The states of at most [`MAX_BUYERS`] buyers.
#[derive(Clone)]
struct BuyerStates {
    /// What one request adds to a state.
    interval: Nanos,
    states: Arc<Mutex<States>>,
    buyers: RateLimitBuyers,
}

#[derive(Default)]
struct States {
    /// When the bucket of each buyer is full again (GCRA's theoretical arrival time).
    full_at: HashMap<BuyerId, Nanos>,
    swept_at: Option<Nanos>,
}

impl BuyerStates {
    fn lock(&self) -> MutexGuard<'_, States> {
        self.states.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl StateStore for BuyerStates {
    type Key = BuyerId;

    // ANCHOR: bounded
    fn measure_and_replace<T, F, E>(&self, buyer: &BuyerId, measure: F) -> Result<T, E>
    where
        F: Fn(Option<Nanos>) -> Result<(T, Nanos), E>,
    {
        let mut states = self.lock();
        if let Some(full_at) = states.full_at.get_mut(buyer) {
            let (passed, next) = measure(Some(*full_at))?;
            *full_at = next;
            return Ok(passed);
        }
        let (passed, next) = measure(None)?;
        let now = next.saturating_sub(self.interval);
        if states.full_at.len() >= MAX_BUYERS {
            states.forget_full(now);
        }
        // On top of the bound a buyer is not counted, and passes.
        if states.full_at.len() < MAX_BUYERS {
            states.full_at.insert(*buyer, next);
        }
        self.buyers.set(states.full_at.len());
        Ok(passed)
    }
    // ANCHOR_END: bounded
}

impl States {
    /// Forgets the buyers whose bucket is full: so is that of a buyer who is not in the table.
    fn forget_full(&mut self, now: Nanos) {
        let due = self.swept_at.is_none_or(|swept_at| now >= swept_at + SWEEP_INTERVAL);
        if due {
            self.full_at.retain(|_, full_at| *full_at > now);
            self.swept_at = Some(now);
        }
    }
}

/// The last [`MAX_ACCEPTED`] ids, the oldest of which makes room for the next.
#[derive(Default)]
struct RecentIds {
    ids: HashSet<Uuid>,
    in_order: VecDeque<Uuid>,
}

impl RecentIds {
    fn contains(&self, id: Uuid) -> bool {
        self.ids.contains(&id)
    }

    fn insert(&mut self, id: Uuid) {
        if !self.ids.insert(id) {
            return;
        }
        if self.in_order.len() == MAX_ACCEPTED
            && let Some(oldest) = self.in_order.pop_front()
        {
            self.ids.remove(&oldest);
        }
        self.in_order.push_back(id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A bucket that is full again takes no place, and one that is not keeps it.
    #[test]
    fn buyers_who_have_gone_make_room_and_a_flood_is_still_stopped() {
        let mut states = States {
            full_at: (0_i64..10)
                .map(|buyer| (buyer, Nanos::new(buyer.unsigned_abs())))
                .collect(),
            swept_at: None,
        };
        states.forget_full(Nanos::new(4));
        let mut left: Vec<BuyerId> = states.full_at.keys().copied().collect();
        left.sort_unstable();
        assert_eq!(left, [5, 6, 7, 8, 9]);
        // Not at every request: the table is big.
        states.forget_full(Nanos::new(9));
        assert_eq!(states.full_at.len(), 5);
        states.forget_full(Nanos::new(4) + SWEEP_INTERVAL);
        assert!(states.full_at.is_empty());
    }

    #[test]
    fn a_buyer_may_send_a_second_s_worth_at_once_and_no_more() {
        let limit: PerBuyer = PerBuyer::new(NonZeroU32::new(5).expect("not 0"), RateLimitBuyers::default());
        let passed = |buyer| (0..100).filter(|_| limit.check(buyer).is_ok()).count();
        let of_one = passed(1);
        assert!((5..50).contains(&of_one), "{of_one} of 100 at once");
        assert!(passed(2) >= 5, "another buyer is held to a limit of their own");
    }

    #[test]
    fn the_ids_of_accepted_orders_are_bounded_and_the_newest_are_kept() {
        let mut recent = RecentIds::default();
        let ids: Vec<Uuid> = (0..MAX_ACCEPTED as u128 + 10).map(Uuid::from_u128).collect();
        for &id in &ids {
            recent.insert(id);
            recent.insert(id);
        }
        assert_eq!((recent.ids.len(), recent.in_order.len()), (MAX_ACCEPTED, MAX_ACCEPTED));
        assert!(!recent.contains(ids[9]) && recent.contains(ids[10]));
    }
}
