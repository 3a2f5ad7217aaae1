//! Redis: its settings and replies, the prefixes of tests, and a server that is stopped and killed.

use std::{
    env,
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    time::Instant,
};

use harness::backends::{self, Redis, Reply};

use crate::{child::TIMEOUT, child_roles::break_private};

pub(crate) async fn serve() {
    let redis = backends::redis().await.unwrap();
    let bulk = |text: &str| Reply::Bulk(text.to_owned());
    for (setting, value) in [("save", ""), ("appendonly", "no")] {
        let reply = redis.command(&["CONFIG", "GET", setting]).await.unwrap();
        assert_eq!(reply, Reply::Array(vec![bulk(setting), bulk(value)]));
        assert_eq!(redis.report().durability[setting], value);
    }

    let report = redis.report();
    assert_eq!(report.source.name(), env::var("OVERSOLD_BACKENDS").unwrap());
    let Reply::Bulk(about) = redis.command(&["INFO", "server"]).await.unwrap() else {
        panic!("INFO has a text");
    };
    assert!(about.contains(&format!("redis_version:{}", report.version)), "{about}");
    assert!(redis.url().contains(&report.address), "{report}");

    // Its port may be reachable from other machines, so it requires a password.
    let mut stranger = TcpStream::connect(&report.address).unwrap();
    stranger.write_all(b"PING\r\n").unwrap();
    let mut answer = String::new();
    BufReader::new(stranger).read_line(&mut answer).unwrap();
    assert!(answer.starts_with("-NOAUTH"), "{answer}");
}

pub(crate) async fn reply() {
    let redis = backends::redis().await.unwrap();
    let (prefix, other) = (redis.prefix(), redis.prefix());
    assert_ne!(*prefix, *other);
    let key = format!("{prefix}lock");
    let bulk = |text: &str| Reply::Bulk(text.to_owned());
    for (words, expected) in [
        (vec!["SET", &key, "me", "NX"], Reply::Status("OK".to_owned())),
        (vec!["SET", &key, "you", "NX"], Reply::Nil),
        (vec!["GET", &key], bulk("me")),
        (vec!["PTTL", &key], Reply::Int(-1)),
        (vec!["MGET", &key, &other], Reply::Array(vec![bulk("me"), Reply::Nil])),
    ] {
        assert_eq!(redis.command(&words).await.unwrap(), expected, "{words:?}");
    }
    let refused = redis.command(&["HGET", &key, "count"]).await.unwrap();
    assert!(
        matches!(&refused, Reply::Error(why) if why.starts_with("WRONGTYPE")),
        "{refused:?}"
    );
}

pub(crate) async fn drop_prefix() {
    let redis = backends::redis().await.unwrap();
    let (kept, dropped) = (redis.prefix(), redis.prefix());
    // More keys than one SCAN returns.
    for number in 0..1500 {
        redis
            .command(&["SET", &format!("{dropped}{number}"), "1"])
            .await
            .unwrap();
    }
    redis.command(&["SET", &format!("{kept}lock"), "1"]).await.unwrap();
    drop(dropped);
    let began = Instant::now();
    while redis.command(&["DBSIZE"]).await.unwrap() != Reply::Int(1) {
        assert!(began.elapsed() < TIMEOUT, "waited for the keys to be deleted");
    }
    assert_eq!(
        redis.command(&["EXISTS", &format!("{kept}lock")]).await.unwrap(),
        Reply::Int(1)
    );
}

pub(crate) async fn stop_and_kill() {
    let redis = Redis::private().await.unwrap();
    let prefix = redis.prefix();
    let address = &redis.report().address;
    let write = async |number: i64| {
        let set = redis.command(&["SET", &format!("{prefix}{number}"), "1"]).await;
        assert_eq!(set.unwrap(), Reply::Status("OK".to_owned()));
        let mut connection = TcpStream::connect(address).unwrap();
        connection.write_all(b"PING\r\n").unwrap();
        assert!(connection.read(&mut [0; 100]).unwrap() > 0, "it is served");
        connection
    };
    let is_cut = async |mut connection: TcpStream| !matches!(connection.read(&mut [0; 100]), Ok(1..));
    let written = async || match redis.command(&["DBSIZE"]).await.ok()? {
        Reply::Int(keys) => Some(keys),
        other => panic!("{other:?}"),
    };
    // It is empty after a restart.
    break_private(&redis, address, write, is_cut, written, [0, 0, 0]).await;
}
