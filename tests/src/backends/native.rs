//! What native servers have in common: where programs are, and who runs them.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

/// A user without rights, for servers that refuse to run as root.
#[derive(Clone, Copy, Debug)]
pub(super) struct User {
    pub(super) uid: u32,
    pub(super) gid: u32,
}

/// Who runs a server when this process runs as root: `postgres` if there is one, else `nobody`. `None` when this process is not root.
pub(super) fn unprivileged_user() -> Option<User> {
    static USER: OnceLock<Option<User>> = OnceLock::new();
    *USER.get_or_init(|| {
        if !rustix::process::geteuid().is_root() {
            return None;
        }
        ["postgres", "nobody"].into_iter().find_map(|name| {
            Some(User {
                uid: id("-u", name)?,
                gid: id("-g", name)?,
            })
        })
    })
}

/// Asks `id`, which knows the users of directories and of macOS as well.
fn id(which: &str, name: &str) -> Option<u32> {
    let answer = Command::new("id").args([which, name]).output().ok()?;
    String::from_utf8_lossy(&answer.stdout).trim().parse().ok()
}

/// Finds a program as the shell would.
pub fn on_path(program: &str) -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?)
        .map(|folder| folder.join(program))
        .find(|file| file.is_file())
}

/// The folders `parent/PREFIX*SUFFIX`, the greatest version in their names first.
pub(super) fn versioned(parent: &str, prefix: &str, suffix: &str) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(parent) else {
        return Vec::new();
    };
    let mut found: Vec<(f64, PathBuf)> = entries
        .filter_map(|entry| {
            let name = entry.ok()?.file_name().into_string().ok()?;
            let version = name.strip_prefix(prefix)?.trim_start_matches(['@', '-']);
            let folder = Path::new(parent).join(&name).join(suffix);
            Some((version.parse().unwrap_or(0.0), folder))
        })
        .collect();
    found.sort_by(|(a, _), (b, _)| b.total_cmp(a));
    found.into_iter().map(|(_, folder)| folder).collect()
}
