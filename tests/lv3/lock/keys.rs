//! The names of a lock in Redis: prefixes, hash tags, and keys that are no lock.

use super::*;

/// A key of that name that is no lock.
#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test]
async fn what_is_no_lock_is_an_error_and_stays_as_it_is(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let lock = ground.lock(kind, LONG).await;
    let _: String = ground.ask(&["SET", &lock.key("sale"), "a text"]).await;
    for wait in [Duration::ZERO, PATIENT] {
        let refused = lock.acquire("sale", &Owner::fresh(), wait).await;
        assert!(matches!(refused, Err(LockError::Redis(_))));
    }
    assert_eq!(ground.ask::<String>(&["GET", &lock.key("sale")]).await, "a text");
    assert_eq!(ground.listeners(&lock.key("sale")).await, 0);
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn another_prefix_or_another_name_is_another_lock(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let lock = ground.lock(kind, LONG).await;
    let elsewhere = format!("{}other:", ground.prefix);
    let other = Lock::open(&ground.url, &elsewhere, kind, LONG).await;
    let held = [
        lock.take("sale").await,
        lock.take("another sale").await,
        other.take("sale").await,
    ];
    let waiter = lock.waits("sale", PATIENT);
    if kind != Spin {
        eventually("it listens", async || ground.listeners(&lock.key("sale")).await == 1).await;
    }
    let mut names: Vec<String> = ground.ask(&["KEYS", "*"]).await;
    names.extend(ground.ask::<Vec<String>>(&["PUBSUB", "CHANNELS"]).await);
    names.retain(|name| name.contains(&ground.prefix));
    assert!(names.len() >= 3, "{names:?}");
    for name in names {
        assert!(name.starts_with(&ground.prefix), "{name}");
        assert_eq!(name.matches(&ground.prefix).count(), 1, "{name}");
    }
    waiter.abort();
    for guard in held {
        assert_eq!(guard.release().await.unwrap(), Released::Free);
    }
}

/// What Redis Cluster puts a key in a slot by (Redis documentation, "Redis cluster specification", hash tags).
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
async fn all_that_belongs_to_a_lock_has_one_hash_tag(#[case] name: &str, #[case] tag: &str) {
    let server = Redis::private().await.unwrap();
    let ground = Ground::on(&server).await;
    let lock = ground.lock(Fenced, LONG).await;
    let _held = lock.take(name).await;
    let _waiter = lock.waits(name, PATIENT);
    eventually("it listens", async || ground.listeners(&lock.key(name)).await == 1).await;
    let mut names: Vec<String> = ground.ask(&["KEYS", "*"]).await;
    names.extend(ground.ask::<Vec<String>>(&["PUBSUB", "CHANNELS"]).await);
    assert_eq!(names.len(), 3, "lock, token, channel: {names:?}");
    for name in names {
        assert_eq!(hash_tag(&name), tag, "{name}");
    }
}
