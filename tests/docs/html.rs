//! The built book: it builds, and its links have targets.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use mdbook_driver::MDBook;
use regex::Regex;

use crate::{
    Problem, none, only,
    pages::{self, Page},
    root,
    rules::without_dots,
};

/// Files that mdBook adds to the pages, with its own links.
const MDBOOKS_OWN: [&str; 3] = ["404.html", "print.html", "toc.html"];

/// The link targets and links of a page of the built book.
#[derive(Default)]
struct Built {
    ids: BTreeSet<String>,
    links: Vec<String>,
}

impl Built {
    fn read(html: &str) -> Self {
        let all = |pattern: &str, text: &str| -> Vec<String> {
            let pattern = Regex::new(pattern).unwrap();
            pattern.captures_iter(text).map(|found| found[1].to_owned()).collect()
        };
        let main = html
            .split_once("<main")
            .and_then(|(_, rest)| rest.split_once("</main>"))
            .map_or(html, |(main, _)| main);
        Self {
            ids: all(r#"\sid="([^"]*)""#, html).into_iter().collect(),
            links: all(r#"<a\s[^>]*href="([^"]*)""#, main),
        }
    }
}

fn links_to_nowhere(built: &BTreeMap<PathBuf, Built>, pages: &[Page], exists: impl Fn(&Path) -> bool) -> Vec<Problem> {
    let mut problems = vec![];
    for (file, page) in built {
        for link in &page.links {
            if link.contains("://") || link.starts_with("mailto:") {
                continue;
            }
            let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = if path.is_empty() {
                file.clone()
            } else {
                without_dots(&file.parent().unwrap_or(Path::new("")).join(path))
            };
            let wrong = match built.get(&target) {
                Some(there) if anchor.is_empty() || there.ids.contains(anchor) => continue,
                Some(_) => format!("{} has nothing called #{anchor}", target.display()),
                None if exists(&target) => continue,
                None => format!("there is no {} in the built book", target.display()),
            };
            let (source, line) = written_at(file, link, pages);
            let to_do = "link to a page as `[words](page.md#heading-in-small-letters)`";
            problems.push(Problem::new(
                source,
                line,
                format!("the link {link:?} leads nowhere: {wrong}"),
                to_do,
            ));
        }
    }
    problems
}

/// The page and line with a link, as far as the built page shows it.
fn written_at(html: &Path, link: &str, pages: &[Page]) -> (PathBuf, usize) {
    let source = Path::new("book/src").join(html.with_extension("md"));
    let written = link.replace(".html", ".md");
    let line = pages
        .iter()
        .find(|page| page.file == source)
        .and_then(|page| {
            page.lines
                .iter()
                .find(|line| line.text.contains(&written) || line.text.contains(link))
        })
        .map_or(1, |line| line.number);
    (source, line)
}

#[test]
fn the_book_builds_and_its_links_lead_somewhere() {
    let folder = tempfile::tempdir().unwrap();
    let mut book =
        MDBook::load(root().join("book")).unwrap_or_else(|error| panic!("the book does not load: {error:#}"));
    book.config.build.build_dir = folder.path().to_owned();
    book.build()
        .unwrap_or_else(|error| panic!("the book does not build: {error:#}"));

    let built: BTreeMap<PathBuf, Built> = pages::files_below(folder.path())
        .into_iter()
        .filter(|file| file.extension().is_some_and(|extension| extension == "html"))
        .map(|file| {
            let html = fs::read_to_string(&file).unwrap();
            (file.strip_prefix(folder.path()).unwrap().to_owned(), Built::read(&html))
        })
        .filter(|(file, _)| !MDBOOKS_OWN.iter().any(|own| file == Path::new(own)))
        .collect();
    let links: usize = built.values().map(|page| page.links.len()).sum();
    assert!(links > built.len(), "the links are not where this test looks for them");
    none(links_to_nowhere(&built, &pages::book(), |file| {
        folder.path().join(file).exists()
    }));
}

#[rstest::rstest]
#[case::page("<a href=\"c.html\">", "there is no c.html")]
#[case::anchor("<a href=\"b.html#gone\">", "b.html has nothing called #gone")]
#[case::anchor_of_its_own("<a class=\"x\" href=\"#gone\">", "a.html has nothing called #gone")]
fn a_link_to_nowhere_is_found(#[case] link: &str, #[case] expected: &str) {
    let book = |link: &str| {
        let a = Built::read(&format!("<a href=\"menu.html\"><main><h1 id=\"one\">{link}</a></main>"));
        let b = Built::read("<main><h1 id=\"two\"></main>");
        BTreeMap::from([(PathBuf::from("a.html"), a), (PathBuf::from("b.html"), b)])
    };
    let pages = [Page::new("book/src/a.md", "\n[c](c.md) [b](b.md#gone) [a](#gone)")];
    for fine in [
        "#one",
        "b.html#two",
        "./b.html",
        "https://doc.rust-lang.org/x.html#y",
        "logo.svg",
    ] {
        let exists = |file: &Path| file == Path::new("logo.svg");
        none(links_to_nowhere(&book(&format!("<a href=\"{fine}\">")), &pages, exists));
    }
    let found = only(links_to_nowhere(&book(link), &pages, |_| false));
    assert!(
        found.starts_with("book/src/a.md:2:") && found.contains(expected),
        "{found}"
    );
}
