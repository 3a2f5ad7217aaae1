//! Locks held by other processes, which are started, killed and frozen here.

use super::*;

const ROLE: &str = "LV3_LOCK_ROLE";

/// Starts this program again as another process with a role.
fn process(role: &str, kind: Kind, env: &LockEnvironment) -> tokio::process::Command {
    let command = reaper::command(std::env::current_exe().unwrap()).unwrap();
    let mut command = tokio::process::Command::from(command);
    command
        .args([
            "--exact",
            "lock::processes::plays_a_role_in_another_test",
            "--nocapture",
        ])
        .env(ROLE, role)
        .env("LV3_LOCK_KIND", format!("{kind:?}"))
        .env("LV3_LOCK_URL", &env.url)
        .env("LV3_LOCK_PREFIX", &env.prefix)
        .stdout(Stdio::null());
    command
}

const OWNERS: usize = 8;
const ROUNDS: usize = 8;

/// Not a test: the entry point of the processes that tests here start. Without a role it does
/// nothing.
#[tokio::test]
async fn plays_a_role_in_another_test() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let setting = |what: &str| std::env::var(format!("LV3_LOCK_{what}")).unwrap();
    let kind = match setting("KIND").as_str() {
        "Rlock" => Rlock,
        "Fenced" => Fenced,
        _ => Spin,
    };
    let env = LockEnvironment {
        raw: raw(&setting("URL")).await,
        url: setting("URL"),
        prefix: setting("PREFIX"),
        _prefix: None,
        _server: None,
    };
    match role.as_str() {
        "counts" | "counts without a lock" => {
            let lock = (role == "counts").then_some(env.lock(kind, RENEWED).await);
            let key = |name: &str| format!("{}{name}", env.prefix);
            let counting = (0..OWNERS).map(|_| async {
                for _ in 0..ROUNDS {
                    let guard = match &lock {
                        Some(lock) => Some(lock.acquire("sale", &Owner::fresh(), LONG_WAIT).await.unwrap()),
                        None => None,
                    };
                    let inside: i64 = env.command(&["INCR", &key("inside")]).await;
                    if inside > 1 {
                        let _: i64 = env.command(&["INCR", &key("met")]).await;
                    }
                    let number: Option<i64> = env.command(&["GET", &key("number")]).await;
                    tokio::time::sleep(ms(1)).await;
                    let next = (number.unwrap_or(0) + 1).to_string();
                    let _: String = env.command(&["SET", &key("number"), &next]).await;
                    let _: i64 = env.command(&["DECR", &key("inside")]).await;
                    if let Some(guard) = guard {
                        assert_eq!(guard.release().await.unwrap(), Released::Free);
                    }
                }
            });
            futures_util::future::join_all(counting).await;
        }
        "holds" => {
            let held = env.lock(kind, RENEWED).await.take("sale").await;
            // In a separate task: this process may be frozen before it reads the answer.
            let (mut raw, holds) = (env.raw.clone(), format!("{}holds", env.prefix));
            tokio::spawn(async move {
                let _: redis::RedisResult<String> =
                    redis::cmd("SET").arg(&holds).arg("yes").query_async(&mut raw).await;
            });
            lost(&held).await;
            let released = format!("{:?}", held.release().await.unwrap());
            let _: String = env
                .command(&["SET", &format!("{}released", env.prefix), &released])
                .await;
        }
        "takes it again and again" => {
            let lock = env.lock(kind, SHORT).await;
            loop {
                let held = lock.acquire("sale", &Owner::fresh(), LONG_WAIT).await.unwrap();
                let _ = held.release().await;
            }
        }
        other => panic!("there is no part {other}"),
    }
}

/// The final value of a shared counter, and how often two owners were in the critical section
/// together.
async fn counted(role: &str, kind: Kind) -> (usize, usize) {
    let env = LockEnvironment::shared().await;
    let mut processes: Vec<_> = (0..3).map(|_| process(role, kind, &env).spawn().unwrap()).collect();
    for process in &mut processes {
        assert!(process.wait().await.unwrap().success());
    }
    let number: usize = env.command(&["GET", &format!("{}number", env.prefix)]).await;
    let met: Option<usize> = env.command(&["GET", &format!("{}met", env.prefix)]).await;
    (number, met.unwrap_or(0))
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn of_many_owners_in_three_processes_one_is_in_the_critical_section(#[case] kind: Kind) {
    assert_eq!(counted("counts", kind).await, (3 * OWNERS * ROUNDS, 0));
}

/// The test above detects a missing lock.
#[tokio::test]
async fn without_a_lock_updates_are_lost() {
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
async fn a_killed_holder_keeps_the_lock_for_the_rest_of_its_lease(#[case] kind: Kind) {
    let env = LockEnvironment::shared().await;
    let lock = env.lock(kind, LONG).await;
    let key = lock.key("sale");
    let mut holder = process("holds", kind, &env).spawn().unwrap();
    eventually("it holds the lock", async || env.pttl(&key).await > 0).await;
    holder.start_kill().unwrap();
    assert_eq!(holder.wait().await.unwrap().signal(), Some(9));
    let read = Instant::now();
    let left = u64::try_from(env.pttl(&key).await).expect("it is held");
    let (_next, at) = lock.spawn_waiter("sale", LONG_WAIT).await.unwrap().unwrap();
    assert!(at - read + REDIS_TICK >= ms(left), "{:?} of {left} ms", at - read);
    assert!(at - read < ms(left) + AT_ONCE, "{:?} of {left} ms", at - read);
}

/// At whatever step the process is killed, its lock has a TTL.
#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn a_process_killed_at_any_moment_leaves_no_lock_without_a_ttl(#[case] kind: Kind) {
    let mut moments = StdRng::seed_from_u64(38);
    let (mut held, mut free) = (0, 0);
    for _ in 0..8 {
        let env = LockEnvironment::shared().await;
        let lock = env.lock(kind, LONG).await;
        let key = lock.key("sale");
        let mut process = process("takes it again and again", kind, &env).spawn().unwrap();
        eventually("it has the lock", async || env.pttl(&key).await > 0).await;
        tokio::time::sleep(Duration::from_micros(moments.random_range(0..20_000))).await;
        process.start_kill().unwrap();
        assert_eq!(
            process.wait().await.unwrap().signal(),
            Some(9),
            "the fault did not strike"
        );
        match env.pttl(&key).await {
            -2 => free += 1,
            left => {
                assert!((0..=500).contains(&left), "{left} ms left");
                held += 1;
            }
        }
        let next = lock.acquire("sale", &Owner::fresh(), LONG_WAIT).await.unwrap();
        assert_eq!(next.release().await.unwrap(), Released::Free);
    }
    println!("{kind:?}: killed {held} times with the lock, {free} times without");
}

/// The limit of every lock with a lease: it passes to the next owner. The holder notices when it
/// resumes.
#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn a_frozen_holder_loses_the_lock_and_notices_when_it_resumes(#[case] kind: Kind) {
    let env = LockEnvironment::shared().await;
    let lock = env.lock(kind, LONG).await;
    let mut holder = process("holds", kind, &env).spawn().unwrap();
    let pid = holder.id().unwrap();
    // The holder reports it: a key in Redis does not prove that the holder has read the answer.
    let holds = format!("{}holds", env.prefix);
    eventually("it holds the lock", async || {
        env.command::<bool>(&["EXISTS", &holds]).await
    })
    .await;
    signal("STOP", pid).await;
    let (next, _) = lock.spawn_waiter("sale", LONG_WAIT).await.unwrap().unwrap();
    signal("CONT", pid).await;
    assert!(holder.wait().await.unwrap().success());
    let released: String = env.command(&["GET", &format!("{}released", env.prefix)]).await;
    assert_eq!(released, "NotOwner");
    assert!(!next.is_lost());
    assert_eq!(next.release().await.unwrap(), Released::Free);
}
