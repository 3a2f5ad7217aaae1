//! A Redis that is down, frozen, unreachable, or has lost its script cache.

use super::*;

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn a_lost_script_cache_has_no_effect(#[case] kind: Kind) {
    let server = Redis::private().await.unwrap();
    let env = LockEnvironment::on(&server).await;
    let lock = env.lock(kind, RENEWED).await;
    let flush = async || assert_eq!(env.command::<String>(&["SCRIPT", "FLUSH"]).await, "OK");
    for round in 0..10 {
        let owner = Owner::fresh();
        flush().await;
        let held = lock.acquire("sale", &owner, LONG_WAIT).await.unwrap();
        if round == 0 {
            flush().await;
            let began = Instant::now();
            eventually("a lease is over", async || began.elapsed() > PAST_RENEWED_LEASE).await;
            assert!(!held.is_lost());
        }
        if kind != Spin {
            flush().await;
            let again = lock.acquire("sale", &owner, LONG_WAIT).await.unwrap();
            flush().await;
            assert_eq!(again.release().await.unwrap(), Released::StillHeld(1));
        }
        flush().await;
        assert_eq!(held.release().await.unwrap(), Released::Free);
        if kind != Spin {
            let _held = lock.take("sale").await;
            flush().await;
            assert!(lock.reentrant().force_release("sale").await.unwrap());
        }
    }
}

/// Waits until the client has reconnected by itself.
async fn answers_again(lock: &Lock) {
    eventually("the client reaches Redis", async || {
        lock.connections().send::<String>(redis::cmd("PING")).await.is_ok()
    })
    .await;
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn without_redis_an_acquisition_fails_and_afterwards_works_again(#[case] kind: Kind) {
    let server = Redis::private().await.unwrap();
    let env = LockEnvironment::on(&server).await;
    let lock = env.lock(kind, RENEWED).await;
    let held = lock.take("held").await;
    let token = held.token();
    server.kill().await.unwrap();

    for wait in [Duration::ZERO, ms(300), LONG_WAIT] {
        let began = Instant::now();
        let error = lock.acquire("sale", &Owner::fresh(), wait).await.err();
        assert!(
            matches!(error, Some(LockError::Redis(_) | LockError::NotAcquired(_))),
            "{error:?}"
        );
        // The wait may time out before the command does.
        assert!(
            wait == ms(300) || matches!(error, Some(LockError::Redis(_))),
            "{error:?}"
        );
        assert!(began.elapsed() < ms(10_000), "it hangs: {:?}", began.elapsed());
    }
    // The lease cannot be renewed, and its holder is notified.
    lost(&held).await;
    server.start().await.unwrap();
    answers_again(&lock).await;
    // Redis has restarted without its data.
    assert_eq!(held.release().await.unwrap(), Released::NotOwner);
    let again = lock.take("held").await;
    assert!(token.is_none() || again.token() > token);
    let began = Instant::now();
    eventually("a lease is over", async || began.elapsed() > PAST_RENEWED_LEASE).await;
    assert!(!again.is_lost());
    assert_eq!(again.release().await.unwrap(), Released::Free);
}

/// A frozen Redis: it answers nothing and closes no connection.
#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn a_frozen_redis_delays_neither_an_error_nor_the_notice_of_a_loss(#[case] kind: Kind) {
    let server = Redis::private().await.unwrap();
    let env = LockEnvironment::on(&server).await;
    let lock = env.lock(kind, Lease::Renewed(ms(900))).await;
    let sent = Instant::now();
    let held = lock.take("sale").await;
    assert_eq!(env.command::<String>(&["CLIENT", "PAUSE", "4000", "ALL"]).await, "OK");
    let waiting = async {
        let began = Instant::now();
        let error = lock.acquire("other", &Owner::fresh(), LONG_WAIT).await.err();
        (error, began.elapsed())
    };
    let lost = async {
        lost(&held).await;
        sent.elapsed()
    };
    let ((error, took), lost) = tokio::join!(waiting, lost);
    assert!(matches!(error, Some(LockError::Redis(_))), "{error:?}");
    // By their own time limits, and not because Redis resumes.
    assert!(took < ms(4_000), "{took:?}");
    assert!(ms(900) <= lost && lost < ms(4_000), "{lost:?}");
}

/// The tasks in a local queue share the error of the first one: they do not run into one time-out
/// each.
#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test]
async fn all_tasks_in_a_local_queue_fail_together_when_redis_does_not_answer(#[case] kind: Kind) {
    const WAITERS: usize = 20;

    let server = Redis::private().await.unwrap();
    let (env, proxy) = behind_a_proxy(&server).await;
    let lock = env.lock(kind, LONG).await;
    let key = lock.key("sale");
    // Another owner holds the lock until all waiters are queued.
    let _: i64 = env.command(&["HSET", &key, "other", "1"]).await;
    let _: i64 = env.command(&["PEXPIRE", &key, "3000"]).await;
    let waiters: Vec<_> = (0..WAITERS).map(|_| lock.spawn_waiter("sale", LONG_WAIT)).collect();
    eventually("they listen", async || env.listeners(&key).await == 1).await;
    proxy.inject(Fault::Blackhole(""));
    for waiter in waiters {
        let result = waiter.await.unwrap();
        assert!(matches!(result, Err(LockError::Redis(_))), "{:?}", result.err());
    }
    assert!(proxy.connections_blackholed() > 0, "the fault did not strike");
    let requests = proxy.chunks_discarded();
    assert!(requests < WAITERS as u64, "Redis got {requests} requests");
}

/// An earlier error does not fail later waiters: the lock is held, so they wait.
#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test]
async fn after_an_error_later_waiters_of_the_process_wait_again(#[case] kind: Kind) {
    let server = Redis::private().await.unwrap();
    let (behind, proxy) = behind_a_proxy(&server).await;
    let (lock, other) = (
        behind.lock(kind, LONG).await,
        LockEnvironment::on(&server).await.lock(kind, LONG).await,
    );
    proxy.inject(Fault::CloseAll);
    let failed = lock.acquire("sale", &Owner::fresh(), LONG_WAIT).await.err();
    assert!(
        matches!(failed, Some(LockError::Redis(_))),
        "the fault did not strike: {failed:?}"
    );
    proxy.inject(Fault::None);
    answers_again(&lock).await;

    let held = other.take("sale").await;
    let waiters = [
        lock.spawn_waiter("sale", LONG_WAIT),
        lock.spawn_waiter("sale", LONG_WAIT),
    ];
    eventually("they listen", async || behind.listeners(&lock.key("sale")).await == 1).await;
    assert_eq!(held.release().await.unwrap(), Released::Free);
    for waiter in waiters {
        let (got, _) = waiter.await.unwrap().unwrap();
        assert_eq!(got.release().await.unwrap(), Released::Free);
    }
}
