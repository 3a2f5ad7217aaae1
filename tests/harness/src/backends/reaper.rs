//! The reaper: stops and removes what this process has made, once this process has ended in whatever way.
//!
//! It is a small shell script in a session of its own that waits for the end of a pipe. Only this process holds the other end, so the kernel
//! closes it when the process ends, by SIGKILL too. All else the reaper needs to know stands in a folder of files, its book:
//! a process signs it *before* it becomes the server it is to be, a container is entered before it is asked for. So there is no moment at
//! which something exists that the reaper can't know of, and a reaper that was killed has told the next one all it needs to sweep.

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

/// A folder that is made, but whose owner has not locked it yet.
const UNOWNED: &str = "oversold-new-";
/// A folder whose owner is alive as long as it holds the lock.
const OWNED: &str = "oversold-run-";
/// How long an owner can take from making its folder to locking it. It takes microseconds.
const LOCK_TIMEOUT: Duration = Duration::from_secs(60);

struct Keeper {
    folder: PathBuf,
    entries: AtomicU32,
    /// Locked as long as this process lives: it tells the next one whether this folder is stale.
    _owner: File,
    /// The reaper waits for its end.
    _pipe: ChildStdin,
}

fn reaper() -> io::Result<&'static Keeper> {
    static KEEPER: OnceLock<Result<Keeper, String>> = OnceLock::new();
    let started = KEEPER.get_or_init(|| Keeper::start().map_err(|error| error.to_string()));
    started
        .as_ref()
        .map_err(|error| io::Error::other(format!("the reaper could not be started: {error}")))
}

/// A command that runs `program` under the eyes of the reaper, in a process group of its own, so that Ctrl-C reaches it through the reaper only.
/// Arguments, environment, user and pipes can be added to it. When this process ends, the group gets SIGINT, and SIGKILL if that does not end it.
///
/// A program that can't be executed shows as a child that exits with code 126 or 127.
///
/// # Errors
/// The reaper could not be started.
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

/// A new empty folder that only this user can read. It goes when this process ends, with all that is in it.
///
/// # Errors
/// It could not be made, or the reaper could not be started.
pub fn folder(name: &str) -> io::Result<PathBuf> {
    let reaper = reaper()?;
    let folder = reaper.folder.join(reaper.entry(name));
    DirBuilder::new().mode(0o700).create(&folder)?;
    Ok(folder)
}

/// The same in memory, for data that nobody needs afterwards, where this machine has room to spare in `/dev/shm`. With thousands of small files
/// and no use for a disk, a database is made there several times as fast.
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
    // Entered before it is made.
    fs::write(
        reaper.folder.join("elsewhere").join(entry),
        format!("{}\n", folder.display()),
    )?;
    let made = DirBuilder::new().mode(0o700).create(&folder);
    Ok(made.is_ok().then_some(folder))
}

/// Removes a folder that [`folder`] or [`folder_in_memory`] made, and what a killed server whose data is in it has left elsewhere.
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

/// Enters a container that is about to be made under this name, by the engine at this address (none: the default one).
pub(super) fn register_container(name: &str, engine: Option<&str>) -> io::Result<()> {
    let entry = reaper()?.folder.join("containers").join(name);
    fs::write(entry, format!("{}\n", engine.unwrap_or_default()))
}

/// Strikes out a container that was removed.
pub(super) fn unregister_container(name: &str) -> io::Result<()> {
    fs::remove_file(reaper()?.folder.join("containers").join(name))
}

impl Keeper {
    fn start() -> io::Result<Self> {
        let new = tempfile::Builder::new()
            .prefix(UNOWNED)
            // A server that runs as another user must be able to reach its own folder in here, but not to look around.
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
        for book in ["containers", "elsewhere"] {
            fs::create_dir(new.path().join(book))?;
        }
        let pids = new.path().join("pids");
        fs::create_dir(&pids)?;
        if let Some(user) = native::unprivileged_user() {
            chown(&pids, Some(user.uid), Some(user.gid))?;
        }

        let name = new.path().file_name().unwrap_or_default().to_string_lossy();
        let folder = new.path().with_file_name(name.replace(UNOWNED, OWNED));
        fs::rename(new.keep(), &folder)?;

        // `setsid` gives it a session of its own; where that program is not (macOS), a group of its own keeps Ctrl-C away, and it ignores SIGHUP.
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

/// The folders of this user that nobody owns any more: their keepers were killed before they could clear them.
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
    // What another user wrote could make this one stop processes and delete files for him.
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
