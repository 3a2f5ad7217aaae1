//! A reentrant lock: woken by a message, renewed by a watchdog, counted by owner.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, Instant},
};

use redis::{RedisResult, Script};
use tokio::sync::Mutex as Queue;
use uuid::Uuid;

use super::{
    Connections, Guard, Lease, LockError, Owner,
    guard::{Head, Holding, Scripts, Terms, Turn},
    wakeup::Releases,
};

/// How often in a row a lock goes from one task of this process to the next without a pause.
///
/// The next one's question follows right behind the release, before any other process has heard of it. As long as somebody queues here, nobody
/// elsewhere would ever get in.
pub const HANDED_ON_AT_MOST: u32 = 100;

/// How long that pause is: others hear of the release in it, and ask.
const OTHERS_TURN: Duration = Duration::from_millis(2);

/// Whether a lock hands out fencing tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tokens {
    /// It does not.
    None,
    /// Each acquisition gets a greater one than all before it, even if Redis lost its memory in between.
    Growing,
}

/// A reentrant lock that any process can take.
///
/// The tasks of this process queue here, and only the first of them asks Redis. So a thousand waiters cost Redis no more than one.
pub struct RLock {
    connections: Connections,
    lease: Lease,
    tokens: Tokens,
    acquire: Script,
    force: Script,
    scripts: Arc<Scripts>,
    names: Mutex<HashMap<String, Name>>,
}

/// What this process knows of one lock.
struct Name {
    queue: Arc<Queue<Turn>>,
    holder: Weak<Holding>,
}

/// A lock as anybody can see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Who holds it.
    pub owner: String,
    /// How often.
    pub holds: u64,
    /// How long it stays held at most, if it is not renewed.
    pub left: Duration,
}

/// The answer to a look.
enum Taken {
    Yes(Hold),
    ReserveError { left: Duration },
}

/// The lock, taken once.
struct Hold {
    id: String,
    /// How often its owner has it, this one included.
    holds: i64,
    token: Option<i64>,
    sent: Instant,
}

impl RLock {
    /// Locks on this Redis, with this lease.
    ///
    /// # Errors
    /// The lease is shorter or longer than Redis can count.
    pub fn new(connections: Connections, lease: Lease, tokens: Tokens) -> Result<Self, LockError> {
        Ok(Self {
            connections,
            lease: lease.checked()?,
            tokens,
            acquire: Script::new(match tokens {
                Tokens::None => include_str!("acquire.lua"),
                Tokens::Growing => include_str!("acquire_with_token.lua"),
            }),
            force: Script::new(include_str!("force.lua")),
            scripts: Arc::new(Scripts {
                release: Script::new(include_str!("release.lua")),
                renew: Script::new(include_str!("renew.lua")),
            }),
            names: Mutex::default(),
        })
    }

    /// Takes the lock if it is free, or already this owner's.
    ///
    /// # Errors
    /// Redis does not answer.
    pub async fn try_acquire(&self, name: &str, owner: &Owner) -> Result<Option<Guard>, LockError> {
        if let Some(again) = self.once_more(name, owner).await? {
            return Ok(Some(again));
        }
        // Somebody of this process has it, or is about to.
        let Ok(mut head) = self.queue(name).try_lock_owned() else {
            return Ok(None);
        };
        let terms = self.terms(name, owner);
        Ok(match self.look_for_all(&terms, &mut head).await? {
            Taken::Yes(hold) => Some(self.hold(name, terms, hold, head)),
            Taken::ReserveError { .. } => None,
        })
    }

    /// Takes the lock, and waits for it so long at most. Nothing is left of a wait that is cancelled.
    ///
    /// An owner may take again what it has. Of two first attempts of one owner at the same time, the second waits for the first to be given back.
    ///
    /// # Errors
    /// [`LockError::NotAcquired`] when the wait is over; or Redis does not answer, whoever of this process's queue asked it.
    pub async fn acquire(&self, name: &str, owner: &Owner, wait: Duration) -> Result<Guard, LockError> {
        if wait.is_zero() {
            let tried = self.try_acquire(name, owner).await?;
            return tried.ok_or(LockError::NotAcquired(wait));
        }
        match tokio::time::timeout(wait, self.wait_for(name, owner)).await {
            Ok(acquired) => acquired,
            Err(_) => Err(LockError::NotAcquired(wait)),
        }
    }

    /// Waits without end: first for its turn in this process, then for Redis.
    async fn wait_for(&self, name: &str, owner: &Owner) -> Result<Guard, LockError> {
        if let Some(again) = self.once_more(name, owner).await? {
            return Ok(again);
        }
        let (queue, queued) = (self.queue(name), Instant::now());
        let (mut head, mut released) = match queue.clone().try_lock_owned() {
            Ok(head) => (head, None),
            Err(_) => {
                // Whoever queues listens already, so that the subscription stays from one to the next.
                let released = self.releases(name);
                (queue.lock_owned().await, Some(released))
            }
        };
        // What one of them has found out need not be found out by each that queued meanwhile, one time-out after another.
        if let Some((at, why)) = &head.failed
            && *at >= queued
        {
            return Err(why.clone().into());
        }
        if head.handed_on >= HANDED_ON_AT_MOST {
            head.handed_on = 0;
            tokio::time::sleep(OTHERS_TURN).await;
        }
        let terms = self.terms(name, owner);
        // ANCHOR: wait
        loop {
            let left = match self.look_for_all(&terms, &mut head).await? {
                Taken::Yes(hold) => return Ok(self.hold(name, terms, hold, head)),
                Taken::ReserveError { left } => left,
            };
            match &mut released {
                // Listens before it looks again: a message that was sent in between would be lost.
                None => released = Some(self.releases(name)),
                // By then it is free at the latest, unless it was renewed, even if the message is lost.
                Some(released) => {
                    let _ = tokio::time::timeout(left, released.next()).await;
                }
            }
        }
        // ANCHOR_END: wait
    }

    /// Listens to the messages that tell of this lock's releases. To wait for such a message alone is a mistake: a holder that dies sends none,
    /// and one that is sent while the connection is away is lost.
    pub fn releases(&self, name: &str) -> Releases {
        self.connections.wakeups.listen(self.channel(name))
    }

    /// Takes a lock again that this owner has in this process, if there is one.
    async fn once_more(&self, name: &str, owner: &Owner) -> RedisResult<Option<Guard>> {
        let Some(holding) = self.own_holding(name, owner) else {
            return Ok(None);
        };
        match self.look(&holding).await? {
            Taken::Yes(again) if again.holds > 1 && holding.taken_again(again.sent) => {
                return Ok(Some(Guard::new(holding, again.id, again.token)));
            }
            // It was lost. To hold it anew under the old guard would hide that from whoever has it.
            Taken::Yes(anew) => drop(holding.give_back(&anew.id).await?),
            // It was lost, and is somebody else's by now.
            Taken::ReserveError { .. } => {}
        }
        holding.lose();
        Ok(None)
    }

    /// Asks Redis, as the first of this process's queue. What comes of it in vain, the others hear from this one.
    async fn look_for_all(&self, terms: &Terms, head: &mut Head) -> RedisResult<Taken> {
        let taken = self.look(terms).await;
        taken.inspect_err(|why| head.failed = Some((Instant::now(), why.clone())))
    }

    /// Asks Redis. If this is cancelled, what it may have taken is given back.
    async fn look(&self, terms: &Terms) -> RedisResult<Taken> {
        let attempt = terms.attempt(Uuid::new_v4().simple().to_string());
        let mut acquire = self.acquire.prepare_invoke();
        acquire.key(&terms.key);
        if self.tokens == Tokens::Growing {
            acquire.key(format!("{}:token", terms.key));
        }
        acquire
            .arg(terms.owner.as_str())
            .arg(terms.lease.millis())
            .arg(attempt.hold());
        let sent = Instant::now();
        let (taken, value, token): (u8, i64, i64) = acquire.invoke_async(&mut terms.commands.clone()).await?;
        let id = attempt.answered();
        Ok(match taken {
            1 => Taken::Yes(Hold {
                id,
                holds: value,
                token: (self.tokens == Tokens::Growing).then_some(token),
                sent,
            }),
            _ => Taken::ReserveError {
                // One without an end is none of ours: somebody else has to delete it.
                left: u64::try_from(value).map_or(terms.lease.time(), Duration::from_millis),
            },
        })
    }

    /// The connections that it uses.
    pub fn connections(&self) -> &Connections {
        &self.connections
    }

    /// Opens the lock, whoever holds it. Says whether there was something to open. A holder in this process learns of it at once, another
    /// at its next renewal or release; who waits in that other process waits for it as well.
    ///
    /// # Errors
    /// Redis does not answer.
    pub async fn force_release(&self, name: &str) -> Result<bool, LockError> {
        // Whoever holds it before it is opened has lost it afterwards.
        let holder = self.names().get(name).and_then(|name| name.holder.upgrade());
        let opened: i64 = self
            .force
            .key(self.connections.key(name))
            .arg(self.channel(name))
            .invoke_async(&mut self.connections.commands.clone())
            .await?;
        // A holder in this process need not wait for its next renewal to learn of it, nor the next one here for the end of a lease.
        if opened == 1
            && let Some(holder) = holder
        {
            holder.lose();
        }
        Ok(opened == 1)
    }

    /// Who holds the lock, if anybody does.
    ///
    /// # Errors
    /// Redis does not answer.
    pub async fn probe(&self, name: &str) -> Result<Option<Probe>, LockError> {
        let key = self.connections.key(name);
        let (owner, fields, left_ms): (Option<String>, u64, i64) = redis::pipe()
            .atomic()
            .cmd("HGET")
            .arg(&key)
            .arg("owner")
            .cmd("HLEN")
            .arg(&key)
            .cmd("PTTL")
            .arg(&key)
            .query_async(&mut self.connections.commands.clone())
            .await?;
        Ok(owner.map(|owner| Probe {
            owner,
            holds: fields - 1,
            left: Duration::from_millis(u64::try_from(left_ms).unwrap_or(0)),
        }))
    }

    fn terms(&self, name: &str, owner: &Owner) -> Terms {
        Terms {
            key: self.connections.key(name),
            channel: self.channel(name),
            owner: owner.clone(),
            lease: self.lease,
            scripts: self.scripts.clone(),
            commands: self.connections.commands.clone(),
        }
    }

    /// The lock is held from here on.
    fn hold(&self, name: &str, terms: Terms, hold: Hold, head: Head) -> Guard {
        let holding = Arc::new(terms.hold(hold.sent, Some(head)));
        if let Some(name) = self.names().get_mut(name) {
            name.holder = Arc::downgrade(&holding);
        }
        Guard::new(holding, hold.id, hold.token)
    }

    fn channel(&self, name: &str) -> String {
        format!("{}:released", self.connections.key(name))
    }

    fn names(&self) -> MutexGuard<'_, HashMap<String, Name>> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The queue of this process's tasks for a lock. Those that nobody uses are forgotten on the way.
    fn queue(&self, name: &str) -> Arc<Queue<Turn>> {
        const KEPT: usize = 1024;

        let mut names = self.names();
        if names.len() >= KEPT {
            names.retain(|_, name| Arc::strong_count(&name.queue) > 1 || name.holder.strong_count() > 0);
        }
        let name = names.entry(name.to_owned()).or_insert_with(|| Name {
            queue: Arc::default(),
            holder: Weak::new(),
        });
        name.queue.clone()
    }

    fn own_holding(&self, name: &str, owner: &Owner) -> Option<Arc<Holding>> {
        let holding = self.names().get(name)?.holder.upgrade()?;
        (holding.owner == *owner && !holding.is_lost()).then_some(holding)
    }
}
