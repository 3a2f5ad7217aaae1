//! Faults of the waiters and of releases: lost messages, stale owners, cancelled waits.

use super::*;

/// Either lock with its own connections, like another process.
enum AnyLock {
    Spin(SpinLock),
    RLock(RLock),
}

impl AnyLock {
    async fn open(environment: &TestEnvironment, name: &str, lease: Duration) -> Self {
        let config = environment.redis(lease).unwrap().unwrap();
        let connections = Connections::open(config.url.expose(), &config.prefix).await.unwrap();
        match name {
            "spin" => Self::Spin(SpinLock::new(connections, Lease::Fixed(lease), Backoff::default()).unwrap()),
            _ => Self::RLock(RLock::new(connections, Lease::Renewed(lease), FencingTokens::None).unwrap()),
        }
    }

    async fn acquire(&self, wait: Duration) -> Result<Guard, LockError> {
        let name = format!("sale:{SALE}");
        match self {
            Self::Spin(lock) => lock.acquire(&name, &Owner::fresh(), wait).await,
            Self::RLock(lock) => lock.acquire(&name, &Owner::fresh(), wait).await,
        }
    }
}

#[rstest]
#[case::spin("spin")]
#[case::rlock("rlock")]
#[tokio::test]
async fn a_release_by_another_owner_is_rejected_and_the_owner_keeps_the_lock(#[case] name: &str) {
    let environment = TestEnvironment::shared(strategy(name)).await.unwrap();
    let redis = backends::redis().await.unwrap();
    let lock = Lock::of(SALE, &environment, &redis);
    let lease = Duration::from_secs(60);
    let (here, there) = tokio::join!(
        AnyLock::open(&environment, name, lease),
        AnyLock::open(&environment, name, lease)
    );

    let late = here.acquire(TIMEOUT).await.unwrap();
    lock.expire().await;
    let owner = there.acquire(TIMEOUT).await.unwrap();
    assert_eq!(late.release().await.unwrap(), Released::NotOwner);
    assert!(lock.is_held().await, "it opened the owner's lock");
    assert_eq!(owner.release().await.unwrap(), Released::Free);
    assert!(!lock.is_held().await);
}

/// The waiter, on another instance than the holder, loses its subscription before the lock is
/// released.
#[rstest]
#[case::rlock("rlock", true)]
#[case::fenced("fenced", true)]
#[case::message_alone("mutants/message-alone", false)]
#[tokio::test]
async fn a_waiter_whose_message_is_lost_gets_in_when_the_lease_has_run_out(#[case] name: &str, #[case] gets_in: bool) {
    // Long enough that the release comes first.
    let lease = Duration::from_secs(4);
    let mut environment = TestEnvironment::shared(strategy(name)).await.unwrap();
    let redis = backends::redis().await.unwrap();
    let lock = Lock::of(SALE, &environment, &redis);
    let history = HistoryRecorder::new(strategy(name));
    let first = instance_frozen_at(DECIDED, &environment, name, lease).await;
    let proxy = Proxy::before(redis.report().address.clone()).await.unwrap();
    environment.redirect_redis(proxy.port()).unwrap();
    let second = instance(&environment, name, lease).await;
    first.create_rush_sale(2).await.unwrap();

    let holds = async {
        let ann = history.reserve(&first, 1).await;
        assert!(is_confirmed(&ann), "{ann:?}");
    };
    let waits = async {
        wait_until_frozen(&first, TIMEOUT).await;
        let mut bob = Box::pin(history.reserve(&second, 2));
        let strikes = async {
            until("Bob listens", async || lock.listeners().await == 1).await;
            inject(&proxy, Fault::CloseOn("SUBSCRIBE")).await;
            history.record_fault("the messages of releases are lost");
            until("there are no subscribers", async || lock.listeners().await == 0).await;
            assert!(
                lock.is_held().await,
                "the fault did not strike: the lease expired before the release"
            );
            first.resume().await.unwrap();
            until("the lock is released", async || !lock.is_held().await).await;
            assert_eq!(
                lock.listeners().await,
                0,
                "the fault did not strike: a subscriber received the release"
            );
        };
        tokio::select! {
            answer = &mut bob => panic!("Bob got {answer:?} before the release and without a message"),
            () = strikes => {}
        }
        let answer = timeout(lease + Duration::from_secs(3), &mut bob).await;
        assert_eq!(answer.is_ok(), gets_in, "Bob, whose message is lost, gets {answer:?}");
        let answer = match answer {
            Ok(answer) => answer,
            Err(_) => {
                assert!(!lock.is_held().await, "the lock is held");
                // He waits for the message alone.
                proxy.inject(Fault::None);
                timeout(TIMEOUT, bob).await.expect("he still waits")
            }
        };
        assert!(is_confirmed(&answer));
        proxy.inject(Fault::None);
        history.record_recovery();
    };
    tokio::join!(holds, waits);
    first.stop().await.unwrap();
    second.stop().await.unwrap();
    let verdict = history.verdict(&environment).await.unwrap();
    assert_after_fault(strategy(name), &verdict, &[]);
}

#[rstest]
#[case::spin("spin", 0)]
#[case::rlock("rlock", 1)]
#[tokio::test]
async fn a_waiter_that_gives_up_or_is_dropped_blocks_no_other(#[case] name: &str, #[case] listens: i64) {
    let environment = TestEnvironment::shared(strategy(name)).await.unwrap();
    let redis = backends::redis().await.unwrap();
    let lock = Lock::of(SALE, &environment, &redis);
    // No acquisition comes from an expired lease.
    let lease = Duration::from_secs(60);
    let (here, there) = tokio::join!(
        AnyLock::open(&environment, name, lease),
        AnyLock::open(&environment, name, lease)
    );
    let held = here.acquire(TIMEOUT).await.unwrap();

    // One waiter times out at the head of its process's queue; one behind it is dropped.
    let short = Duration::from_millis(300);
    let (gives_up, dropped) = tokio::join!(there.acquire(short), timeout(short, there.acquire(TIMEOUT)));
    assert!(matches!(gives_up, Err(LockError::NotAcquired(_))));
    assert!(dropped.is_err());
    until("there are no subscribers any more", async || {
        lock.listeners().await == 0
    })
    .await;

    // The waiter at the head is dropped, with another behind it.
    {
        let mut head = Box::pin(there.acquire(TIMEOUT));
        let queued = async {
            let what = "the fault did not strike: it is not in the queue";
            until(what, async || lock.listeners().await == listens).await;
        };
        tokio::select! {
            _ = &mut head => panic!("the lock is held"),
            () = queued => {}
        }
        let mut next = Box::pin(there.acquire(lease));
        assert!(timeout(Duration::from_millis(50), &mut next).await.is_err());
        drop(head);
        assert!(timeout(Duration::from_millis(50), &mut next).await.is_err());
        assert_eq!(held.release().await.unwrap(), Released::Free);
        let got = timeout(TIMEOUT, next)
            .await
            .expect("the queue does not move on")
            .unwrap();
        assert_eq!(got.release().await.unwrap(), Released::Free);
    }
    until("there are no subscribers any more", async || {
        lock.listeners().await == 0
    })
    .await;
    assert!(!lock.is_held().await, "a dropped waiter holds the lock");
}

/// The test above detects a wait that outlives its caller, such as one in a detached task.
#[tokio::test]
async fn a_wait_that_outlives_its_caller_is_detected() {
    let environment = TestEnvironment::shared(strategy("rlock")).await.unwrap();
    let redis = backends::redis().await.unwrap();
    let lock = Lock::of(SALE, &environment, &redis);
    let (here, there) = tokio::join!(
        AnyLock::open(&environment, "rlock", LEASE),
        AnyLock::open(&environment, "rlock", LEASE)
    );
    let _held = here.acquire(TIMEOUT).await.unwrap();
    drop(tokio::spawn(async move { there.acquire(Duration::MAX).await }));
    until("it is in the queue", async || lock.listeners().await == 1).await;
    let no_subscribers = "there are no subscribers any more";
    let noticed = panic_of(until(no_subscribers, async || lock.listeners().await == 0)).await;
    assert!(noticed.contains(no_subscribers), "{noticed}");
}
