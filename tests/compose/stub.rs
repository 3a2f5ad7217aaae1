//! A server that answers as a test wants, over one TCP stream for each request.

use std::{
    io::{BufRead, BufReader, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
};

/// The value of a header.
pub(crate) fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().find_map(|line| {
        let (found, value) = line.split_once(':')?;
        found.eq_ignore_ascii_case(name).then(|| value.trim())
    })
}

/// A server that keeps the heads of the requests that it has received.
pub(crate) struct Stub {
    pub(crate) address: SocketAddr,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Stub {
    /// `answer` gets the head of each request, and writes what it likes. The connection is closed then.
    pub(crate) fn start(answer: impl Fn(&str, &mut TcpStream) + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let requests = Arc::<Mutex<Vec<String>>>::default();
        let (answer, received) = (Arc::new(answer), Arc::clone(&requests));
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (answer, received) = (Arc::clone(&answer), Arc::clone(&received));
                thread::spawn(move || {
                    let mut stream = stream.unwrap();
                    let lines = BufReader::new(stream.try_clone().unwrap()).lines();
                    let head: Vec<String> = lines
                        .map_while(Result::ok)
                        .take_while(|line| !line.is_empty())
                        .collect();
                    if !head.is_empty() {
                        let head = head.join("\n");
                        received.lock().unwrap().push(head.clone());
                        answer(&head, &mut stream);
                    }
                });
            }
        });
        Self { address, requests }
    }

    /// One that answers every request with 200.
    pub(crate) fn willing() -> Self {
        Self::start(|_, stream| {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nok\n");
        })
    }

    /// One that receives every request, and closes the connection without an answer.
    pub(crate) fn dying() -> Self {
        Self::start(|_, _| {})
    }

    pub(crate) fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }
}
