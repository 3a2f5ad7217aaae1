//! The Docker engine: set-up and suite find the same one. And ports: a server whose port was taken in
//! the meantime gets another, in a container or as a process.
//!
//! The engine is a fake one that serves a socket, and records its requests.

use std::{
    collections::VecDeque,
    fs,
    io::{self, BufRead, BufReader, Write},
    os::unix::{
        fs::PermissionsExt,
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex},
    thread,
};

use harness::backends::{Source, on_path};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    Test,
    child::{Role, temp, text},
    of_one, repository,
    service::Service,
};

pub(crate) fn tests() -> Vec<Test> {
    let mut tests = vec![
        of_one(
            "a_port_that_was_taken_in_the_meantime_is_replaced::docker",
            Service::Redis,
            &[],
            a_port_that_was_taken_is_replaced,
        ),
        of_one(
            "a_port_that_was_taken_in_the_meantime_is_replaced::native",
            Service::Redis,
            &[Source::Native],
            a_port_of_a_process_that_was_taken_is_replaced,
        ),
    ];
    // The docker CLI keeps the contexts.
    if on_path("docker").is_some() {
        tests.push(of_one(
            "setup_and_suite_use_the_engine_of_the_docker_context",
            Service::Redis,
            &[],
            setup_and_suite_use_the_engine_of_the_context,
        ));
    }
    if !Path::new(DEFAULT_SOCKET).exists() {
        tests.push(of_one(
            "setup_and_suite_use_the_socket_of_a_rootless_engine",
            Service::Redis,
            &[],
            setup_and_suite_use_the_socket_of_a_rootless_engine,
        ));
    }
    tests
}

/// Comes before all others.
const DEFAULT_SOCKET: &str = "/var/run/docker.sock";

/// The context `elsewhere`, whose folder the docker CLI names by its SHA-256.
const CONTEXT: &str = "elsewhere";
const CONTEXT_FOLDER: &str = "contexts/meta/7b1b763ee8f62eb88e4742a760f912d0b19bcd58b2b948999784bacc15a7f4d7";

const FULL: &str = "no space left on device";

fn setup_and_suite_use_the_engine_of_the_context() {
    let engine = FakeEngine::serve("engine.sock", &[FULL; 3]);
    let folder = engine.folder.path().join("config");
    fs::create_dir_all(folder.join(CONTEXT_FOLDER)).unwrap();
    let context = json!({
        "Name": CONTEXT,
        "Metadata": {},
        "Endpoints": { "docker": { "Host": engine.address(), "SkipTLSVerify": false } },
    });
    fs::write(folder.join(CONTEXT_FOLDER).join("meta.json"), context.to_string()).unwrap();
    let config = folder.join("config.json");
    let set = |command: &mut Command, name: &str, value: &str| {
        command.env("DOCKER_CONFIG", &folder).env(name, value);
    };

    fs::write(&config, json!({ "currentContext": CONTEXT }).to_string()).unwrap();
    engine.is_used_by_setup_and_suite(|command| set(command, "DOCKER_HOST", ""));

    fs::write(&config, "{}").unwrap();
    engine.is_used_by_setup_and_suite(|command| set(command, "DOCKER_CONTEXT", CONTEXT));

    // The address wins over a context.
    fs::write(&config, json!({ "currentContext": "nowhere" }).to_string()).unwrap();
    engine.is_used_by_setup_and_suite(|command| set(command, "DOCKER_HOST", &engine.address()));
}

fn setup_and_suite_use_the_socket_of_a_rootless_engine() {
    for socket in ["docker.sock", "podman/podman.sock"] {
        let engine = FakeEngine::serve(socket, &[FULL]);
        engine.is_used_by_setup_and_suite(|command| {
            command
                .env("XDG_RUNTIME_DIR", engine.folder.path())
                .env("DOCKER_CONFIG", engine.folder.path());
        });
    }
}

/// In both wordings of Docker. What else goes wrong is reported.
fn a_port_that_was_taken_is_replaced() {
    let engine = FakeEngine::serve(
        "engine.sock",
        &[
            "driver failed programming external connectivity on endpoint oversold: \
             Bind for 0.0.0.0:17001 failed: port is already allocated",
            "driver failed programming external connectivity on endpoint oversold: \
             failed to bind host port for 0.0.0.0:17002:172.17.0.2:6379/tcp: address already in use",
            FULL,
        ],
    );
    let error = engine.error_of_the_suite(|command| {
        command.env("DOCKER_HOST", engine.address());
    });
    assert!(error.contains(FULL), "{error}");
    let mut ports = engine.ports();
    assert_eq!(ports.len(), 3, "{ports:?}");
    ports.dedup();
    assert_eq!(ports.len(), 3, "{ports:?}");
}

/// Its first process finds its port taken, and says more than that.
fn a_port_of_a_process_that_was_taken_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let tried = folder.path().join("tried");
    let script = format!(
        "#!/bin/sh\n\
         echo \"$@\" >>'{tried}'\n\
         [ \"$(wc -l <'{tried}')\" -eq 1 ] || exec '{program}' \"$@\"\n\
         echo '# Warning: Could not create server TCP listening socket 127.0.0.1:17001: bind: Address already in use'\n\
         for line in 1 2 3 4 5 6 7 8 9 10 11 12; do echo \"line $line after it\"; done\n\
         exit 1\n",
        tried = tried.display(),
        program = on_path("redis-server").unwrap().display(),
    );
    let program = folder.path().join("redis-server");
    fs::write(&program, script).unwrap();
    // A server runs as another user if this one is root.
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).unwrap();

    let temp = temp();
    let role = Role::new(Service::Redis, "find", temp.path()).forced(Source::Native);
    let report = role.set("OVERSOLD_REDIS_BIN", folder.path()).json();
    assert_eq!(report["source"], "native", "{report}");
    let tried = fs::read_to_string(tried).unwrap();
    let ports: Vec<&str> = tried.lines().filter_map(|words| words.rsplit(' ').next()).collect();
    assert_eq!(ports.len(), 2, "{tried}");
    assert_ne!(ports[0], ports[1], "{tried}");
}

/// An engine that has every image, and starts no container.
struct FakeEngine {
    folder: TempDir,
    socket: PathBuf,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    /// Method and path of every request.
    requests: Vec<String>,
    /// The body of every request to create a container.
    created: Vec<Value>,
    /// Why the next containers do not start.
    reasons: VecDeque<&'static str>,
}

impl FakeEngine {
    fn serve(socket: &str, reasons: &[&'static str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join(socket);
        fs::create_dir_all(socket.parent().unwrap()).unwrap();
        let listener = UnixListener::bind(&socket).unwrap();
        let state = Arc::new(Mutex::new(State {
            reasons: reasons.iter().copied().collect(),
            ..State::default()
        }));
        let served = Arc::clone(&state);
        // Both end with the test program.
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = Arc::clone(&served);
                // The client closes its connections whenever it likes.
                thread::spawn(move || drop(answer_all(stream, &state)));
            }
        });
        Self { folder, socket, state }
    }

    fn address(&self) -> String {
        format!("unix://{}", self.socket.display())
    }

    fn ports(&self) -> Vec<String> {
        let state = self.state.lock().unwrap();
        let port = |body: &Value| {
            body["HostConfig"]["PortBindings"]["6379/tcp"][0]["HostPort"]
                .as_str()
                .unwrap()
                .to_owned()
        };
        state.created.iter().map(port).collect()
    }

    fn received(&self, what: &str) -> bool {
        let mut requests = std::mem::take(&mut self.state.lock().unwrap().requests).into_iter();
        requests.any(|request| request.contains(what))
    }

    /// Runs set-up and suite on Docker with these settings.
    fn is_used_by_setup_and_suite(&self, settings: impl Fn(&mut Command)) {
        let mut setup = Command::new(repository().join("infra/setup.sh"));
        setup
            .arg("redis")
            .env("OVERSOLD_BACKENDS", "docker")
            .env_remove("REDIS_URL");
        without_an_engine(&mut setup);
        settings(&mut setup);
        let output = setup.output().unwrap();
        assert_eq!(text(&output), "exit status: 0\n");
        assert!(self.received("GET /images/redis:7-alpine/json"));

        let error = self.error_of_the_suite(settings);
        assert!(error.contains(FULL), "{error}");
        assert!(self.received("POST /containers/create"));
    }

    /// Why the suite gets no Redis from Docker with these settings.
    fn error_of_the_suite(&self, settings: impl Fn(&mut Command)) -> String {
        let temp = temp();
        let mut role = Role::new(Service::Redis, "find", temp.path()).forced(Source::Docker);
        without_an_engine(&mut role.0);
        settings(&mut role.0);
        role.json()["error"].as_str().unwrap().to_owned()
    }
}

/// Removes what may name an engine.
fn without_an_engine(command: &mut Command) {
    for variable in ["DOCKER_HOST", "DOCKER_CONTEXT", "DOCKER_CONFIG", "OVERSOLD_REDIS_IMAGE"] {
        command.env_remove(variable);
    }
    command.env("HOME", "/nowhere");
}

fn answer_all(stream: UnixStream, state: &Mutex<State>) -> io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut writer = stream;
    loop {
        let Some((request, body)) = read_request(&mut reader)? else {
            return Ok(());
        };
        let (status, answer) = answer(&request, &body, &mut state.lock().unwrap());
        let answer = if request.starts_with("HEAD ") {
            String::new()
        } else {
            answer
        };
        write!(
            writer,
            "HTTP/1.1 {status} x\r\nApi-Version: 1.41\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{answer}",
            answer.len()
        )?;
    }
}

/// Method and path of the next request, without the version of the API, and its body.
fn read_request(reader: &mut impl BufRead) -> io::Result<Option<(String, Vec<u8>)>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace();
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let path = match path.strip_prefix("/v1.") {
        Some(versioned) => &versioned[versioned.find('/').unwrap_or(0)..],
        None => path,
    };
    let request = format!("{method} {path}");
    let mut length = 0;
    loop {
        let mut header = String::new();
        reader.read_line(&mut header)?;
        let Some((name, value)) = header.split_once(':') else {
            break;
        };
        if name.eq_ignore_ascii_case("content-length") {
            length = value.trim().parse().unwrap();
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    Ok(Some((request, body)))
}

fn answer(request: &str, body: &[u8], state: &mut State) -> (u16, String) {
    state.requests.push(request.to_owned());
    let (method, path) = request.split_once(' ').unwrap();
    match method {
        _ if path == "/_ping" => (200, "OK".to_owned()),
        "GET" if path == "/version" => (
            200,
            json!({ "ApiVersion": "1.41", "MinAPIVersion": "1.24" }).to_string(),
        ),
        "POST" if path.starts_with("/containers/create") => {
            state.created.push(serde_json::from_slice(body).unwrap());
            (201, json!({ "Id": "c0", "Warnings": [] }).to_string())
        }
        "POST" if path.ends_with("/start") => {
            let reason = state.reasons.pop_front().unwrap_or("it never starts");
            (500, json!({ "message": reason }).to_string())
        }
        "GET" => (200, json!({ "Id": "c0" }).to_string()),
        "DELETE" => (204, String::new()),
        _ => (404, json!({ "message": "no such page" }).to_string()),
    }
}
