//! The live page in a real browser: LV.1's server, driven through headless Chromium by `page.mjs`.
//!
//! It needs Chromium, Node and two packages of npm. Where one is missing, the tests show as ignored, with the reason.

#![allow(clippy::unwrap_used)]

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use harness::{
    backends::{NginxSettings, TestEnvironment, on_path, on_system_path},
    rush::{Program, Rush, Servers},
};
use libtest_mimic::{Arguments, Completion, Trial};
use lv1_race_condition::LEVEL;
use tokio::{runtime::Runtime, task};

/// The scenarios of `page.mjs`.
const SCENARIOS: [&str; 12] = [
    "it fills and shows the oversell in red with its number",
    "it reconnects after its instance has died",
    "it is operable by keyboard alone",
    "it has no accessibility violation",
    "without a token it shows and starts nothing",
    "the token is in no address no log no storage and no source",
    "it says that the database is away and recovers",
    "it shows which instance has sold which ticket",
    "two strategies race beside each other",
    THROUGH_NGINX,
    "it moves nothing for those who prefer it",
    "it can be shown on a phone a laptop and a projector in both themes",
];

/// The scenario whose page comes through nginx, in front of three instances.
const THROUGH_NGINX: &str = "through nginx it fills with the tickets of all instances";

fn main() {
    let mut arguments = Arguments::from_args();
    // A browser and a rush take all processors of a small machine.
    arguments.test_threads = Some(arguments.test_threads.unwrap_or(2).min(2));
    let trials = SCENARIOS.map(|scenario| {
        Trial::ignorable_test(scenario.replace(' ', "_"), move || {
            let tools = match tools() {
                Ok(tools) => tools,
                Err(missing) => return Ok(Completion::ignored_with(missing)),
            };
            if scenario == THROUGH_NGINX {
                let Some(nginx) = on_system_path("nginx") else {
                    return Ok(Completion::ignored_with("no nginx: infra/test-tools.sh installs it"));
                };
                run_through_nginx(&tools, nginx)?;
            } else {
                run(scenario, &tools, &[])?;
            }
            Ok(Completion::Completed)
        })
    });
    libtest_mimic::run(&arguments, trials.into()).exit();
}

/// The programs that drive the page.
struct Tools {
    chromium: PathBuf,
    node: PathBuf,
    modules: PathBuf,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .parent()
        .unwrap()
}

/// # Errors
/// The reason for ignored tests.
fn tools() -> Result<Tools, &'static str> {
    let chromium = ["chromium", "chromium-browser", "google-chrome"]
        .into_iter()
        .find_map(on_path);
    let modules = root().join("target/tools/live");
    Ok(Tools {
        chromium: chromium.ok_or("no chromium: infra/test-tools.sh installs it")?,
        node: on_path("node").ok_or("no node: infra/test-tools.sh installs it")?,
        modules: match modules.join("node_modules/puppeteer-core").exists() {
            true => modules,
            false => return Err("no puppeteer-core: infra/test-tools.sh installs it"),
        },
    })
}

fn run_through_nginx(tools: &Tools, nginx: PathBuf) -> Result<(), String> {
    let settings = NginxSettings {
        executable: nginx,
        template: root().join("infra/stand/nginx/nginx.conf.template"),
        port: None,
    };
    let rush = Rush {
        instances: 3,
        nginx: Some(settings),
        work: Duration::from_millis(2),
        ..Rush::default()
    };
    let program = Program::new(env!("CARGO_BIN_EXE_lv1-race-condition"));
    let strategy = LEVEL.strategy("read-then-write").unwrap();
    Runtime::new().unwrap().block_on(async {
        let environment = TestEnvironment::shared(strategy).await.unwrap();
        let servers = Servers::start(&rush, &environment, &program, &LEVEL, strategy)
            .await
            .unwrap();
        let site = format!("http://{}", servers.nginx().unwrap().address());
        let site = [("SITE", site.as_str()), ("SITE_TOKEN", servers.admin_token())];
        task::block_in_place(|| run(THROUGH_NGINX, tools, &site))
    })
}

fn run(scenario: &str, tools: &Tools, site: &[(&str, &str)]) -> Result<(), String> {
    let runtime = Runtime::new().unwrap();
    let [own, other] = ["read-then-write", "check-then-decrement"].map(|name| {
        let strategy = LEVEL.strategy(name).unwrap();
        runtime.block_on(TestEnvironment::shared(strategy)).unwrap()
    });
    let mut node = Command::new(&tools.node)
        .arg(root().join("tests/live/page.mjs"))
        .arg(scenario)
        .env("PROGRAM", env!("CARGO_BIN_EXE_lv1-race-condition"))
        .env("DATABASE_URL", own.database().url())
        .env("OTHER_DATABASE_URL", other.database().url())
        .env("CHROMIUM", &tools.chromium)
        .env("TOOLS", &tools.modules)
        .envs(site.iter().copied())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|why| why.to_string())?;
    // It ends when this is closed, however this process ends.
    let _input = node.stdin.take();
    let ended = node.wait_with_output().map_err(|why| why.to_string())?;
    match ended.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&ended.stderr).into_owned()),
    }
}
