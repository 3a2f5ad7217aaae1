//! Leases: their expiry, their renewal by the watchdog, and their limits.

use super::*;

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn a_fixed_lease_ends_by_itself_and_lets_the_next_one_in(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    // One waits where the holder is, one elsewhere: the first for its turn in this process, the second for the key to end.
    let (here, there) = (ground.lock(kind, SHORT).await, ground.lock(kind, SHORT).await);
    for (name, next) in [("here", &here), ("there", &there)] {
        let sent = Instant::now();
        let held = here.take(name).await;
        let monitor = ground.monitor().await;
        let left = ground.pttl(&here.key(name)).await;
        assert!(0 < left && left <= 500, "{left} ms left");
        let (_next, at) = next.waits(name, PATIENT).await.unwrap().unwrap();
        assert!(at - sent + A_TICK >= ms(500), "{name}: after {:?}", at - sent);
        assert!(at - sent < ms(500) + PROMPTLY, "{name}: after {:?}", at - sent);
        assert!(held.is_lost());
        held.lost().await;
        // Nobody renewed it: the lease was set when it was taken, by whoever did.
        let renewed = monitor.about(&ground, "\"pexpire\"").await;
        let renewed = renewed.iter().filter(|line| line.contains(&here.key(name))).count();
        assert!(renewed <= 1, "a lease was set {renewed} times, for one more holder");
    }
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn a_renewed_lease_lasts_as_long_as_its_holder_whoever_tries(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let (here, there) = (ground.lock(kind, RENEWED).await, ground.lock(kind, RENEWED).await);
    let key = here.key("sale");
    let held = here.take("sale").await;
    let began = Instant::now();
    let mut renewed = 0;
    let mut left = ground.pttl(&key).await;
    // Every third of it: four times is longer than it would have lasted.
    while renewed < 4 {
        assert!(here.refuses("sale").await && there.refuses("sale").await);
        let now = ground.pttl(&key).await;
        assert!(now > 0, "lost after {:?}", began.elapsed());
        renewed += u32::from(now > left);
        left = now;
        tokio::time::sleep(ms(10)).await;
    }
    assert!(began.elapsed() > RENEWED.duration() && !held.is_lost());
    assert_eq!(held.release().await.unwrap(), Released::Free);
    // Its watchdog went with it.
    let monitor = ground.monitor().await;
    let next = ground.lock(kind, SHORT).await.take("sale").await;
    next.lost().await;
    let calls = monitor.calls(&ground, &key).await;
    assert_eq!(calls.len(), 1, "{calls:#?}");
}

/// What another task does with the same name must not make this process forget whose lock it renews.
#[rstest]
#[case::rlock(Rlock)]
#[case::spin(Spin)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn short_holds_of_others_do_not_end_a_renewal(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let lock = ground.lock(kind, RENEWED).await;
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
    while began.elapsed() < OVER {
        assert!(lock.refuses("sale").await);
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
    let ground = Ground::shared().await;
    let lock = ground.lock(kind, RENEWED).await;
    let mut held = Vec::new();
    for number in 0..250 {
        held.push(lock.take(&format!("sale {number}")).await);
    }
    let began = Instant::now();
    eventually("a lease is over", async || began.elapsed() > OVER).await;
    for guard in held {
        assert_eq!(guard.release().await.unwrap(), Released::Free);
    }
}

#[tokio::test]
async fn a_lease_that_redis_cannot_count_is_refused() {
    let ground = Ground::shared().await;
    let connections = Connections::open(&ground.url, &ground.prefix).await.unwrap();
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

/// Whoever has the first guard has worked without a lock, and must learn of it.
#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test]
async fn a_loss_is_not_healed_by_taking_the_lock_again(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let (here, there) = (ground.lock(kind, LONG).await, ground.lock(kind, LONG).await);
    let owner = Owner::fresh();
    for taken_by_somebody in [false, true] {
        let lost = here.acquire("sale", &owner, PATIENT).await.unwrap();
        assert_eq!(ground.ask::<i64>(&["DEL", &here.key("sale")]).await, 1);
        if taken_by_somebody {
            let theirs = there.take("sale").await;
            assert!(here.try_acquire("sale", &owner).await.unwrap().is_none());
            assert!(lost.is_lost());
            assert_eq!(theirs.release().await.unwrap(), Released::Free);
            assert_eq!(lost.release().await.unwrap(), Released::NotOwner);
        } else {
            let anew = here.acquire("sale", &owner, PATIENT).await.unwrap();
            assert!(lost.is_lost() && !anew.is_lost());
            assert_eq!(lost.release().await.unwrap(), Released::NotOwner);
            assert!(there.refuses("sale").await);
            assert_eq!(anew.release().await.unwrap(), Released::Free);
        }
    }
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn a_lock_is_never_there_without_an_end(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let lock = ground.lock(kind, LONG).await;
    let key = lock.key("sale");
    let churn = tokio::spawn(async move {
        for _ in 0..300 {
            let held = lock.take("sale").await;
            assert_eq!(held.release().await.unwrap(), Released::Free);
        }
    });
    let mut seen = 0;
    while !churn.is_finished() {
        let left = ground.pttl(&key).await;
        assert!(left == -2 || (0..=20_000).contains(&left), "{left}");
        seen += u32::from(left > 0);
    }
    churn.await.unwrap();
    assert!(seen > 0, "it was never seen held");
}

/// Nothing of what this process says reaches Redis, and nobody tells it so.
#[rstest]
#[case::rlock(Rlock)]
#[case::spin(Spin)]
#[tokio::test]
async fn one_renewal_may_fail_and_the_next_still_comes_in_time(#[case] kind: Kind) {
    let server = Redis::private().await.unwrap();
    let (ground, proxy) = behind_a_proxy(&server).await;
    // Its third is as long as a command may take: who waited for the answer first would have no time for another renewal.
    let lock = ground.lock(kind, Lease::Renewed(ms(1_500))).await;
    let held = lock.take("sale").await;
    proxy.cuts(Cut::Silence(""));
    held.lost().await;
    assert!(proxy.connections_silenced() > 0, "the fault did not strike");
    let renewals = proxy.said_in_vain();
    assert!(renewals >= 2, "{renewals} within one lease");
}
