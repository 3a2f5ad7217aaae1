//! The reaper: stops and removes what this process has started, however this process ends.
//!
//! It is a small shell script in its own session that waits for the end of a pipe. Only this
//! process holds the other end, so the kernel closes the pipe when this process ends, even by
//! SIGKILL. Everything else the reaper needs is in a folder of files, its registry. A process
//! registers *before* it executes the server's program, and a container is registered before it is
//! created. The registry therefore lists everything that exists at any moment, and after a killed
//! reaper the next run can clean up from it.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, Permissions},
    io::{self, Write},
    os::unix::{
        fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{ChildStdin, Command, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use super::native;

const SCRIPT: &str = include_str!("reaper.sh");

/// Prefix of a folder that its owner has not locked yet.
const UNOWNED: &str = "oversold-new-";
/// Prefix of a folder whose owner is alive as long as it holds the lock.
const OWNED: &str = "oversold-run-";
/// Upper bound of the time from creating a folder to locking it, which takes microseconds.
const LOCK_TIMEOUT: Duration = Duration::from_secs(60);

struct Reaper {
    folder: PathBuf,
    entries: AtomicU32,
    /// Locked as long as this process lives: shows other runs that the folder is not stale.
    _owner: File,
    /// The pipe whose end the reaper waits for.
    _pipe: ChildStdin,
}

fn reaper() -> io::Result<&'static Reaper> {
    static REAPER: OnceLock<Result<Reaper, String>> = OnceLock::new();
    let started = REAPER.get_or_init(|| Reaper::start().map_err(|error| error.to_string()));
    started
        .as_ref()
        .map_err(|error| io::Error::other(format!("the reaper could not be started: {error}")))
}

/// A command that runs `program` registered with the reaper, in its own process group, so that
/// Ctrl-C reaches it only through the reaper. The caller may add arguments, environment, user and
/// pipes. When this process ends, the group receives SIGINT, then SIGKILL if it is still alive.
///
/// If the program can't be executed, the child exits with code 126 or 127.
///
/// # Errors
/// An I/O error if the reaper could not be started.
pub fn command(program: impl AsRef<Path>) -> io::Result<Command> {
    let reaper = reaper()?;
    let program = program.as_ref();
    let name = program.file_name().unwrap_or(program.as_os_str());
    let mut command = Command::new("sh");
    command
        .arg(reaper.folder.join("reaper.sh"))
        .arg("run")
        .arg(&reaper.folder)
        .arg(reaper.entry(&name.to_string_lossy()))
        .arg(program)
        .process_group(0);
    Ok(command)
}

/// Creates an empty folder that only this user can read. The reaper removes it with its contents
/// when this process ends.
///
/// # Errors
/// An I/O error if the folder could not be created or the reaper could not be started.
pub fn folder(name: &str) -> io::Result<PathBuf> {
    let reaper = reaper()?;
    let folder = reaper.folder.join(reaper.entry(name));
    DirBuilder::new().mode(0o700).create(&folder)?;
    Ok(folder)
}

/// Creates such a folder in memory (`/dev/shm`), for data that does not outlive this process.
/// `None` if less than 1 GiB is free there. A database consists of thousands of small files and is
/// created several times as fast there as on a disk.
///
/// # Errors
/// As [`folder`].
pub fn folder_in_memory(name: &str) -> io::Result<Option<PathBuf>> {
    const MEMORY: &str = "/dev/shm";
    const ROOM_BYTES: u64 = 1 << 30;

    let Ok(about) = rustix::fs::statvfs(MEMORY) else {
        return Ok(None);
    };
    if about.f_bavail.saturating_mul(about.f_frsize) < ROOM_BYTES {
        return Ok(None);
    }
    let reaper = reaper()?;
    let entry = reaper.entry(name);
    let folder = Path::new(MEMORY).join(format!("oversold-{:016x}", rand::random::<u64>()));
    // Registered before it is created.
    fs::write(
        reaper.folder.join("elsewhere").join(entry),
        format!("{}\n", folder.display()),
    )?;
    let made = DirBuilder::new().mode(0o700).create(&folder);
    Ok(made.is_ok().then_some(folder))
}

/// Removes a folder of [`folder`] or [`folder_in_memory`], and the shared memory of a killed server
/// whose data is in it.
pub(super) fn clear(folder: &Path) -> io::Result<()> {
    let cleared = Command::new("sh")
        .arg(reaper()?.folder.join("reaper.sh"))
        .arg("clear")
        .arg(folder)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()?;
    if cleared.success() {
        Ok(())
    } else {
        Err(io::Error::other(format!("{} could not be removed", folder.display())))
    }
}

/// Registers a container before it is created under this name by the engine at this address.
/// `None`: the default engine.
pub(super) fn register_container(name: &str, engine: Option<&str>) -> io::Result<()> {
    let entry = reaper()?.folder.join("containers").join(name);
    fs::write(entry, format!("{}\n", engine.unwrap_or_default()))
}

/// Unregisters a container that was removed.
pub(super) fn unregister_container(name: &str) -> io::Result<()> {
    fs::remove_file(reaper()?.folder.join("containers").join(name))
}

impl Reaper {
    fn start() -> io::Result<Self> {
        let new = tempfile::Builder::new()
            .prefix(UNOWNED)
            // A server that runs as another user must reach its own folder in here, but not list
            // the others.
            .permissions(Permissions::from_mode(0o711))
            .tempdir()?;
        let owner = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(new.path().join("owner"))?;
        owner.lock()?;

        let script = new.path().join("reaper.sh");
        fs::write(&script, SCRIPT)?;
        fs::set_permissions(&script, Permissions::from_mode(0o644))?;
        for registry in ["containers", "elsewhere"] {
            fs::create_dir(new.path().join(registry))?;
        }
        let pids = new.path().join("pids");
        fs::create_dir(&pids)?;
        if let Some(user) = native::unprivileged_user() {
            chown(&pids, Some(user.uid), Some(user.gid))?;
        }

        let name = new.path().file_name().unwrap_or_default().to_string_lossy();
        let folder = new.path().with_file_name(name.replace(UNOWNED, OWNED));
        fs::rename(new.keep(), &folder)?;

        // `setsid` starts a new session. Where that program is missing (macOS), a new process group
        // keeps Ctrl-C away, and the script ignores SIGHUP.
        let mut command = match native::on_path("setsid") {
            Some(setsid) => {
                let mut command = Command::new(setsid);
                command.arg("sh");
                command
            }
            None => {
                let mut command = Command::new("sh");
                command.process_group(0);
                command
            }
        };
        let mut child = command
            .arg(folder.join("reaper.sh"))
            .arg("keep")
            .arg(&folder)
            .args(stale_folders())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let mut pipe = child.stdin.take().ok_or(io::ErrorKind::BrokenPipe)?;
        pipe.flush()?;
        Ok(Self {
            folder,
            entries: AtomicU32::new(0),
            _owner: owner,
            _pipe: pipe,
        })
    }

    fn entry(&self, name: &str) -> String {
        format!("{name}-{}", self.entries.fetch_add(1, Ordering::Relaxed))
    }
}

/// This user's folders without a living owner: their reapers were killed before they could clear
/// them.
fn stale_folders() -> Vec<PathBuf> {
    let Ok(folders) = fs::read_dir(std::env::temp_dir()) else {
        return Vec::new();
    };
    folders
        .filter_map(|folder| Some(folder.ok()?.path()))
        .filter(|folder| is_stale(folder).unwrap_or(false))
        .collect()
}

fn is_stale(folder: &Path) -> io::Result<bool> {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    let owned = name.starts_with(OWNED);
    if !owned && !name.starts_with(UNOWNED) {
        return Ok(false);
    }
    let about = fs::symlink_metadata(folder)?;
    // A folder written by another user could make this process stop processes and delete files on
    // that user's behalf.
    if !about.is_dir() || about.uid() != rustix::process::geteuid().as_raw() {
        return Ok(false);
    }
    if !owned && about.modified()?.elapsed().unwrap_or_default() < LOCK_TIMEOUT {
        return Ok(false);
    }
    match File::open(folder.join("owner")) {
        Ok(owner) => Ok(owner.try_lock().is_ok()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(error) => Err(error),
    }
}
