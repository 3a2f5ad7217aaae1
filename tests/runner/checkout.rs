//! A checkout on a system that converts line ends.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use tempfile::tempdir;

/// Files with a carriage return would not run (scripts), would not apply (patches), would have another checksum (migrations), or would
/// differ from what is generated (snippets).
#[test]
fn no_file_gets_other_line_ends_from_a_system_that_converts_them() {
    let folder = tempdir().unwrap();
    let checkout = folder.path().join("checkout");
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    git(
        folder.path(),
        &[
            "-c",
            "core.autocrlf=true",
            "clone",
            "--quiet",
            "--shared",
            "--config",
            "core.autocrlf=true",
        ],
        &[root, &checkout],
    );
    let converted = converted(&checkout);
    assert!(converted.is_empty(), "{converted:?}");

    // Without the attributes it does convert: that is what they are for.
    let script = "infra/setup.sh";
    fs::remove_file(checkout.join(".gitattributes")).unwrap();
    fs::remove_file(checkout.join(script)).unwrap();
    git(&checkout, &["rm", "--quiet", "--cached", ".gitattributes"], &[]);
    git(&checkout, &["checkout", "--quiet", "--", script], &[]);
    assert!(fs::read(checkout.join(script)).unwrap().contains(&b'\r'));
}

/// The text files with a carriage return.
fn converted(checkout: &Path) -> Vec<PathBuf> {
    let listed = Command::new("git")
        .arg("-C")
        .arg(checkout)
        .args(["ls-files", "--eol", "-z"])
        .output()
        .unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    // Such as `i/lf w/crlf attr/text=auto<tab>README.md`; of a binary file it is `w/-text`.
    let files: Vec<(&str, &str)> = listed
        .split_terminator('\0')
        .map(|file| file.split_once('\t').unwrap())
        .collect();
    assert!(files.len() > 100, "{files:?}");
    let converted = files
        .into_iter()
        .filter(|(ends, _)| ends.contains("w/crlf") || ends.contains("w/mixed"));
    converted.map(|(_, file)| file.into()).collect()
}

fn git(folder: &Path, words: &[&str], paths: &[&Path]) {
    let status = Command::new("git")
        .arg("-C")
        .arg(folder)
        .args(words)
        .args(paths)
        .status();
    assert!(status.unwrap().success(), "git {}", words.join(" "));
}
