//! Leases: their expiry, their renewal by the watchdog, and their limits.

use super::*;

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn a_fixed_lease_expires_and_the_next_waiter_acquires_the_lock(#[case] kind: Kind) {
    let env = LockEnvironment::shared().await;
    // One waiter in the holder's process, in its local queue; one in another process, for the key
    // to expire.
    let (here, there) = (env.lock(kind, SHORT).await, env.lock(kind, SHORT).await);
    for (name, next) in [("here", &here), ("there", &there)] {
        let sent = Instant::now();
        let held = here.take(name).await;
        let monitor = env.monitor().await;
        let left = env.pttl(&here.key(name)).await;
        assert!(0 < left && left <= 500, "{left} ms left");
        let (_next, at) = next.spawn_waiter(name, LONG_WAIT).await.unwrap().unwrap();
        assert!(at - sent + REDIS_TICK >= ms(500), "{name}: after {:?}", at - sent);
        assert!(at - sent < ms(500) + AT_ONCE, "{name}: after {:?}", at - sent);
        assert!(held.is_lost());
        lost(&held).await;
        // It was not renewed: the lease started with the acquisition.
        let renewed = monitor.about(&env, "\"pexpire\"").await;
        let renewed = renewed.iter().filter(|line| line.contains(&here.key(name))).count();
        assert!(renewed <= 1, "a lease was set {renewed} times, for one more holder");
    }
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn a_renewed_lease_lasts_as_long_as_its_holder(#[case] kind: Kind) {
    let env = LockEnvironment::shared().await;
    let (here, there) = (env.lock(kind, RENEWED).await, env.lock(kind, RENEWED).await);
    let key = here.key("sale");
    let held = here.take("sale").await;
    let began = Instant::now();
    let mut renewed = 0;
    let mut left = env.pttl(&key).await;
    // Renewed every third of the lease: four renewals outlast it.
    while renewed < 4 {
        assert!(here.rejects_others("sale").await && there.rejects_others("sale").await);
        let now = env.pttl(&key).await;
        assert!(now > 0, "lost after {:?}", began.elapsed());
        renewed += u32::from(now > left);
        left = now;
        tokio::time::sleep(ms(10)).await;
    }
    assert!(began.elapsed() > RENEWED.duration() && !held.is_lost());
    assert_eq!(held.release().await.unwrap(), Released::Free);
    // Its watchdog has stopped.
    let monitor = env.monitor().await;
    let next = env.lock(kind, SHORT).await.take("sale").await;
    lost(&next).await;
    let calls = monitor.calls(&env, &key).await;
    assert_eq!(calls.len(), 1, "{calls:#?}");
}

/// The process is frozen for longer than the lease: no timer has run when it asks.
#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test(flavor = "current_thread")]
async fn a_holder_that_asks_right_after_a_freeze_learns_that_its_lease_is_over(
    #[case] kind: Kind,
    #[values(SHORT, Lease::Renewed(SHORT.duration()))] lease: Lease,
) {
    let env = LockEnvironment::shared().await;
    let lock = env.lock(kind, lease).await;
    let held = lock.take("sale").await;
    assert!(!held.is_lost());
    // Of this runtime's one thread: neither its tasks nor its timers run meanwhile.
    let frozen = Instant::now();
    while frozen.elapsed() <= lease.duration() {
        std::thread::sleep(ms(10));
    }
    assert!(held.is_lost());
    lost(&held).await;
}

/// Acquisitions by other tasks under the same name must not stop the watchdog of this one.
#[rstest]
#[case::rlock(Rlock)]
#[case::spin(Spin)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn short_acquisitions_of_others_do_not_stop_a_renewal(#[case] kind: Kind) {
    let env = LockEnvironment::shared().await;
    let lock = env.lock(kind, RENEWED).await;
    for _ in 0..20 {
        let tries: Vec<_> = (0..16)
            .map(|_| {
                let lock = lock.clone();
                tokio::spawn(async move {
                    if let Some(guard) = lock.try_acquire("sale", &Owner::fresh()).await.unwrap() {
                        assert_eq!(guard.release().await.unwrap(), Released::Free);
                    }
                })
            })
            .collect();
        for task in tries {
            task.await.unwrap();
        }
    }
    let held = lock.take("sale").await;
    let began = Instant::now();
    while began.elapsed() < PAST_RENEWED_LEASE {
        assert!(lock.rejects_others("sale").await);
        assert!(!held.is_lost());
        tokio::time::sleep(ms(5)).await;
    }
    assert_eq!(held.release().await.unwrap(), Released::Free);
}

#[rstest]
#[case::rlock(Rlock)]
#[case::spin(Spin)]
#[tokio::test]
async fn hundreds_of_locks_are_renewed(#[case] kind: Kind) {
    let env = LockEnvironment::shared().await;
    let lock = env.lock(kind, RENEWED).await;
    let mut held = Vec::new();
    for number in 0..250 {
        held.push(lock.take(&format!("sale {number}")).await);
    }
    let began = Instant::now();
    eventually("a lease is over", async || began.elapsed() > PAST_RENEWED_LEASE).await;
    for guard in held {
        assert_eq!(guard.release().await.unwrap(), Released::Free);
    }
}

#[tokio::test]
async fn a_lease_that_redis_cannot_represent_is_rejected() {
    let env = LockEnvironment::shared().await;
    let connections = Connections::open(&env.url, &env.prefix).await.unwrap();
    let nothing = [Duration::ZERO, Duration::from_micros(999)];
    for time in nothing {
        for lease in [Lease::Fixed(time), Lease::Renewed(time)] {
            let rlock = RLock::new(connections.clone(), lease, FencingTokens::None);
            assert!(matches!(rlock.err(), Some(LockError::LeaseTooShort(_))), "{lease:?}");
            let spin = SpinLock::new(connections.clone(), lease, Backoff::default());
            assert!(matches!(spin.err(), Some(LockError::LeaseTooShort(_))), "{lease:?}");
        }
    }
    for lease in [Lease::Fixed(Duration::MAX), Lease::Renewed(Duration::MAX)] {
        let rlock = RLock::new(connections.clone(), lease, FencingTokens::Monotonic);
        assert!(matches!(rlock.err(), Some(LockError::LeaseTooLong(_))), "{lease:?}");
        let spin = SpinLock::new(connections.clone(), lease, Backoff::default());
        assert!(matches!(spin.err(), Some(LockError::LeaseTooLong(_))), "{lease:?}");
    }
}

/// The user of the first guard has worked without the lock, and must be notified.
#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test]
async fn a_loss_is_not_hidden_by_a_new_acquisition(#[case] kind: Kind) {
    let env = LockEnvironment::shared().await;
    let (here, there) = (env.lock(kind, LONG).await, env.lock(kind, LONG).await);
    let owner = Owner::fresh();
    for taken_by_other in [false, true] {
        let lost = here.acquire("sale", &owner, LONG_WAIT).await.unwrap();
        assert_eq!(env.command::<i64>(&["DEL", &here.key("sale")]).await, 1);
        if taken_by_other {
            let theirs = there.take("sale").await;
            assert!(here.try_acquire("sale", &owner).await.unwrap().is_none());
            assert!(lost.is_lost());
            assert_eq!(theirs.release().await.unwrap(), Released::Free);
            assert_eq!(lost.release().await.unwrap(), Released::NotOwner);
        } else {
            let anew = here.acquire("sale", &owner, LONG_WAIT).await.unwrap();
            assert!(lost.is_lost() && !anew.is_lost());
            assert_eq!(lost.release().await.unwrap(), Released::NotOwner);
            assert!(there.rejects_others("sale").await);
            assert_eq!(anew.release().await.unwrap(), Released::Free);
        }
    }
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn a_lock_never_exists_without_a_ttl(#[case] kind: Kind) {
    let env = LockEnvironment::shared().await;
    let lock = env.lock(kind, LONG).await;
    let key = lock.key("sale");
    let churn = tokio::spawn(async move {
        for _ in 0..300 {
            let held = lock.take("sale").await;
            assert_eq!(held.release().await.unwrap(), Released::Free);
        }
    });
    let mut seen = 0;
    while !churn.is_finished() {
        let left = env.pttl(&key).await;
        assert!(left == -2 || (0..=20_000).contains(&left), "{left}");
        seen += u32::from(left > 0);
    }
    churn.await.unwrap();
    assert!(seen > 0, "it was never seen held");
}

/// A blackhole: no data reaches Redis, and no connection is closed.
#[rstest]
#[case::rlock(Rlock)]
#[case::spin(Spin)]
#[tokio::test]
async fn one_renewal_may_fail_and_the_next_still_comes_in_time(#[case] kind: Kind) {
    let server = Redis::private().await.unwrap();
    let (env, proxy) = behind_a_proxy(&server).await;
    // A third of the lease equals the command time-out: waiting for one answer would leave no time
    // for the next renewal.
    let lock = env.lock(kind, Lease::Renewed(ms(1_500))).await;
    let held = lock.take("sale").await;
    proxy.inject(Fault::Blackhole(""));
    lost(&held).await;
    assert!(proxy.connections_blackholed() > 0, "the fault did not strike");
    let renewals = proxy.chunks_discarded();
    assert!(renewals >= 2, "{renewals} within one lease");
}
