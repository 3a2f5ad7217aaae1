//! The names of a lock in Redis: prefixes, hash tags, and keys that are no lock.

use super::*;

/// The key exists with another type.
#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test]
async fn a_key_of_another_type_is_an_error_and_stays_unchanged(#[case] kind: Kind) {
    let env = LockEnvironment::shared().await;
    let lock = env.lock(kind, LONG).await;
    let _: String = env.command(&["SET", &lock.key("sale"), "a text"]).await;
    for wait in [Duration::ZERO, LONG_WAIT] {
        let refused = lock.acquire("sale", &Owner::fresh(), wait).await;
        assert!(matches!(refused, Err(LockError::Redis(_))));
    }
    assert_eq!(env.command::<String>(&["GET", &lock.key("sale")]).await, "a text");
    assert_eq!(env.listeners(&lock.key("sale")).await, 0);
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn another_prefix_or_another_name_is_another_lock(#[case] kind: Kind) {
    let env = LockEnvironment::shared().await;
    let lock = env.lock(kind, LONG).await;
    let elsewhere = format!("{}other:", env.prefix);
    let other = Lock::open(&env.url, &elsewhere, kind, LONG).await;
    let held = [
        lock.take("sale").await,
        lock.take("another sale").await,
        other.take("sale").await,
    ];
    let waiter = lock.spawn_waiter("sale", LONG_WAIT);
    if kind != Spin {
        eventually("it listens", async || env.listeners(&lock.key("sale")).await == 1).await;
    }
    let mut names: Vec<String> = env.command(&["KEYS", "*"]).await;
    names.extend(env.command::<Vec<String>>(&["PUBSUB", "CHANNELS"]).await);
    names.retain(|name| name.contains(&env.prefix));
    assert!(names.len() >= 3, "{names:?}");
    for name in names {
        assert!(name.starts_with(&env.prefix), "{name}");
        assert_eq!(name.matches(&env.prefix).count(), 1, "{name}");
    }
    waiter.abort();
    for guard in held {
        assert_eq!(guard.release().await.unwrap(), Released::Free);
    }
}

/// The part of a key that selects its slot (Redis documentation, "Redis cluster specification",
/// hash tags).
fn hash_tag(key: &str) -> &str {
    let tag = key.split_once('{').and_then(|(_, rest)| rest.split_once('}'));
    tag.map_or(key, |(tag, _)| if tag.is_empty() { key } else { tag })
}

#[rstest]
#[case::plain("sale", "sale")]
#[case::tagged("a {sale} of tickets", "sale")]
#[case::empty_braces("a {} of tickets", "a {")]
#[case::one_brace("a {sale", "a {sale")]
#[tokio::test]
async fn all_keys_of_a_lock_share_one_hash_tag(#[case] name: &str, #[case] tag: &str) {
    let server = Redis::private().await.unwrap();
    let env = LockEnvironment::on(&server).await;
    let lock = env.lock(Fenced, LONG).await;
    let _held = lock.take(name).await;
    let _waiter = lock.spawn_waiter(name, LONG_WAIT);
    eventually("it listens", async || env.listeners(&lock.key(name)).await == 1).await;
    let mut names: Vec<String> = env.command(&["KEYS", "*"]).await;
    names.extend(env.command::<Vec<String>>(&["PUBSUB", "CHANNELS"]).await);
    assert_eq!(names.len(), 3, "lock, token, channel: {names:?}");
    for name in names {
        assert_eq!(hash_tag(&name), tag, "{name}");
    }
}
