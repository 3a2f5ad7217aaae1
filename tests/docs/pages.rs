//! The pages in Markdown, with prose and code told apart.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::LazyLock,
};

use regex::Regex;

use crate::root;

/// A Markdown file.
pub(crate) struct Page {
    /// From the root of the repository.
    pub(crate) file: PathBuf,
    pub(crate) lines: Vec<Line>,
}

/// A line of a page.
pub(crate) struct Line {
    /// From 1.
    pub(crate) number: usize,
    pub(crate) text: String,
    pub(crate) kind: Kind,
}

/// The kind of a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Prose,
    /// ``` or ~~~, at the start or end of a code block.
    Fence,
    /// A line of a code block in this language.
    Code(String),
}

impl Page {
    pub(crate) fn new(file: impl Into<PathBuf>, text: &str) -> Self {
        let mut lines = vec![];
        let mut open: Option<(String, String)> = None;
        for (index, text) in text.lines().enumerate() {
            let start = text.trim_start();
            let first = start.chars().next().filter(|first| "`~".contains(*first));
            let mark: String = start.chars().take_while(|&other| Some(other) == first).collect();
            let kind = match &open {
                Some((fence, _)) if mark.starts_with(fence.as_str()) && start[mark.len()..].trim().is_empty() => {
                    open = None;
                    Kind::Fence
                }
                Some((_, language)) => Kind::Code(language.clone()),
                None if mark.len() >= 3 => {
                    let words = start[mark.len()..].split([',', ' ']).next().unwrap_or_default();
                    open = Some((mark, words.to_owned()));
                    Kind::Fence
                }
                None => Kind::Prose,
            };
            lines.push(Line {
                number: index + 1,
                text: text.to_owned(),
                kind,
            });
        }
        Self {
            file: file.into(),
            lines,
        }
    }

    fn read(file: &Path) -> Self {
        let text = fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        Self::new(file.strip_prefix(root()).unwrap(), &text)
    }

    /// The lines outside code.
    pub(crate) fn prose(&self) -> impl Iterator<Item = &Line> {
        self.lines.iter().filter(|line| line.kind == Kind::Prose)
    }

    /// Inline code in the prose, with its line number.
    pub(crate) fn inline_code(&self) -> impl Iterator<Item = (usize, &str)> {
        static CODE: LazyLock<Regex> = LazyLock::new(|| Regex::new("`([^`]+)`").unwrap());
        self.prose().flat_map(|line| {
            CODE.captures_iter(&line.text)
                .map(|found| (line.number, found.get(1).unwrap().as_str()))
        })
    }
}

/// Every page of the book, but not its table of contents.
pub(crate) fn book() -> Vec<Page> {
    let source = root().join("book/src");
    let mut pages: Vec<Page> = files_below(&source)
        .into_iter()
        .filter(|file| file.extension().is_some_and(|extension| extension == "md") && !file.ends_with("SUMMARY.md"))
        .map(|file| Page::read(&file))
        .collect();
    pages.sort_by(|one, other| one.file.cmp(&other.file));
    pages
}

/// The table of contents.
pub(crate) fn summary() -> Page {
    Page::read(&root().join("book/src/SUMMARY.md"))
}

/// The book, and the README.
pub(crate) fn all() -> Vec<Page> {
    let readme = root().join("README.md");
    let mut pages = book();
    if readme.exists() {
        pages.push(Page::read(&readme));
    }
    pages
}

/// Every file below this folder, in no order; none if there is no such folder.
pub(crate) fn files_below(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else {
        return vec![];
    };
    let paths = entries.map(|entry| entry.unwrap().path());
    paths
        .flat_map(|path| if path.is_dir() { files_below(&path) } else { vec![path] })
        .collect()
}

#[test]
fn code_is_told_from_prose() {
    let page = Page::new("page.md", "Run `make rush`.\n\n```sh\nmake test\n```\nMore.");
    let kinds: Vec<&Kind> = page.lines.iter().map(|line| &line.kind).collect();
    let sh = Kind::Code("sh".to_owned());
    assert_eq!(
        kinds,
        [
            &Kind::Prose,
            &Kind::Prose,
            &Kind::Fence,
            &sh,
            &Kind::Fence,
            &Kind::Prose
        ]
    );
    assert_eq!(page.inline_code().collect::<Vec<_>>(), [(1, "make rush")]);
}
