//! Locks held by other processes, which are started, killed and frozen here.

use super::*;

const ROLE: &str = "LV3_LOCK_ROLE";

/// This program once more, as another process with a part of its own.
fn process(role: &str, kind: Kind, ground: &Ground) -> tokio::process::Command {
    let command = keeper::command(std::env::current_exe().unwrap()).unwrap();
    let mut command = tokio::process::Command::from(command);
    command
        .args([
            "--exact",
            "lock::processes::plays_a_part_in_another_test",
            "--nocapture",
        ])
        .env(ROLE, role)
        .env("LV3_LOCK_KIND", format!("{kind:?}"))
        .env("LV3_LOCK_URL", &ground.url)
        .env("LV3_LOCK_PREFIX", &ground.prefix)
        .stdout(Stdio::null());
    command
}

const OWNERS: usize = 8;
const ROUNDS: usize = 8;

/// No test: what the other processes do that tests here start. Without a part it has nothing to do.
#[tokio::test]
async fn plays_a_part_in_another_test() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let told = |what: &str| std::env::var(format!("LV3_LOCK_{what}")).unwrap();
    let kind = match told("KIND").as_str() {
        "Rlock" => Rlock,
        "Fenced" => Fenced,
        _ => Spin,
    };
    let ground = Ground {
        raw: raw(&told("URL")).await,
        url: told("URL"),
        prefix: told("PREFIX"),
        _prefix: None,
        _server: None,
    };
    match role.as_str() {
        "counts" | "counts without a lock" => {
            let lock = (role == "counts").then_some(ground.lock(kind, RENEWED).await);
            let key = |name: &str| format!("{}{name}", ground.prefix);
            let counting = (0..OWNERS).map(|_| async {
                for _ in 0..ROUNDS {
                    let guard = match &lock {
                        Some(lock) => Some(lock.acquire("sale", &Owner::fresh(), PATIENT).await.unwrap()),
                        None => None,
                    };
                    let inside: i64 = ground.ask(&["INCR", &key("inside")]).await;
                    if inside > 1 {
                        let _: i64 = ground.ask(&["INCR", &key("met")]).await;
                    }
                    let number: Option<i64> = ground.ask(&["GET", &key("number")]).await;
                    tokio::time::sleep(ms(1)).await;
                    let next = (number.unwrap_or(0) + 1).to_string();
                    let _: String = ground.ask(&["SET", &key("number"), &next]).await;
                    let _: i64 = ground.ask(&["DECR", &key("inside")]).await;
                    if let Some(guard) = guard {
                        assert_eq!(guard.release().await.unwrap(), Released::Free);
                    }
                }
            });
            futures_util::future::join_all(counting).await;
        }
        "holds" => {
            let held = ground.lock(kind, RENEWED).await.take("sale").await;
            // In a task of its own: it may be frozen before it hears the answer, and then the answer is too late.
            let (mut raw, holds) = (ground.raw.clone(), format!("{}holds", ground.prefix));
            tokio::spawn(async move {
                let _: redis::RedisResult<String> =
                    redis::cmd("SET").arg(&holds).arg("yes").query_async(&mut raw).await;
            });
            held.lost().await;
            let told = format!("{:?}", held.release().await.unwrap());
            let _: String = ground.ask(&["SET", &format!("{}told", ground.prefix), &told]).await;
        }
        "takes it again and again" => {
            let lock = ground.lock(kind, SHORT).await;
            loop {
                let held = lock.acquire("sale", &Owner::fresh(), PATIENT).await.unwrap();
                let _ = held.release().await;
            }
        }
        other => panic!("there is no part {other}"),
    }
}

/// The number that many counted up together, and how often two of them met.
async fn counted(role: &str, kind: Kind) -> (usize, usize) {
    let ground = Ground::shared().await;
    let mut processes: Vec<_> = (0..3).map(|_| process(role, kind, &ground).spawn().unwrap()).collect();
    for process in &mut processes {
        assert!(process.wait().await.unwrap().success());
    }
    let number: usize = ground.ask(&["GET", &format!("{}number", ground.prefix)]).await;
    let met: Option<usize> = ground.ask(&["GET", &format!("{}met", ground.prefix)]).await;
    (number, met.unwrap_or(0))
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn of_many_in_three_processes_one_is_inside(#[case] kind: Kind) {
    assert_eq!(counted("counts", kind).await, (3 * OWNERS * ROUNDS, 0));
}

/// The check above would see it.
#[tokio::test]
async fn without_a_lock_they_meet_and_lose_count() {
    let (number, met) = counted("counts without a lock", Rlock).await;
    assert!(number < 3 * OWNERS * ROUNDS, "{number}");
    assert!(met > 0);
}

async fn signal(name: &str, pid: u32) {
    let sent = tokio::process::Command::new("kill")
        .args([format!("-{name}"), pid.to_string()])
        .status();
    assert!(sent.await.unwrap().success());
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn a_killed_holder_keeps_the_lock_for_what_is_left_of_its_lease(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let lock = ground.lock(kind, LONG).await;
    let key = lock.key("sale");
    let mut holder = process("holds", kind, &ground).spawn().unwrap();
    eventually("it holds the lock", async || ground.pttl(&key).await > 0).await;
    holder.start_kill().unwrap();
    assert_eq!(holder.wait().await.unwrap().signal(), Some(9));
    let read = Instant::now();
    let left = u64::try_from(ground.pttl(&key).await).expect("it is held");
    let (_next, at) = lock.waits("sale", PATIENT).await.unwrap().unwrap();
    assert!(at - read + A_TICK >= ms(left), "{:?} of {left} ms", at - read);
    assert!(at - read < ms(left) + PROMPTLY, "{:?} of {left} ms", at - read);
}

/// Whatever it was about to do with the lock, no part of it stays.
#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn killed_at_any_moment_a_process_leaves_no_lock_without_an_end(#[case] kind: Kind) {
    let mut moments = StdRng::seed_from_u64(38);
    let (mut held, mut free) = (0, 0);
    for _ in 0..8 {
        let ground = Ground::shared().await;
        let lock = ground.lock(kind, LONG).await;
        let key = lock.key("sale");
        let mut process = process("takes it again and again", kind, &ground).spawn().unwrap();
        eventually("it has the lock", async || ground.pttl(&key).await > 0).await;
        tokio::time::sleep(Duration::from_micros(moments.random_range(0..20_000))).await;
        process.start_kill().unwrap();
        assert_eq!(
            process.wait().await.unwrap().signal(),
            Some(9),
            "the fault did not strike"
        );
        match ground.pttl(&key).await {
            -2 => free += 1,
            left => {
                assert!((0..=500).contains(&left), "{left} ms left");
                held += 1;
            }
        }
        let next = lock.acquire("sale", &Owner::fresh(), PATIENT).await.unwrap();
        assert_eq!(next.release().await.unwrap(), Released::Free);
    }
    println!("{kind:?}: killed {held} times with the lock, {free} times without");
}

/// The limit of every lock with a lease: it goes to the next one. The holder learns of it once it goes on.
#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn a_frozen_holder_loses_the_lock_and_is_told_when_it_goes_on(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let lock = ground.lock(kind, LONG).await;
    let mut holder = process("holds", kind, &ground).spawn().unwrap();
    let pid = holder.id().unwrap();
    // It says so itself: a lock that is there is the holder's for Redis, and the holder may not have heard of it yet.
    let holds = format!("{}holds", ground.prefix);
    eventually("it holds the lock", async || {
        ground.ask::<bool>(&["EXISTS", &holds]).await
    })
    .await;
    signal("STOP", pid).await;
    let (next, _) = lock.waits("sale", PATIENT).await.unwrap().unwrap();
    signal("CONT", pid).await;
    assert!(holder.wait().await.unwrap().success());
    let told: String = ground.ask(&["GET", &format!("{}told", ground.prefix)]).await;
    assert_eq!(told, "NotOwner");
    assert!(!next.is_lost());
    assert_eq!(next.release().await.unwrap(), Released::Free);
}
