//! The build script of a level: compiles its mutants into it.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs, io,
    path::{Path, PathBuf},
};

use anyhow::Context;

use crate::{
    Mutant,
    refresh::{committed, git},
};

/// Set where the mutants of a level are not opened: in the copies of the exercises, which are built again and again, and in the image.
/// They are most of the build, and half of LV.4's program.
pub const WITHOUT_MUTANTS: &str = "OVERSOLD_WITHOUT_MUTANTS";

/// Generates the module `mutants` of a level from its folder of that name. The level includes it as
///
/// ```text
/// pub mod mutants {
///     include!(concat!(env!("OUT_DIR"), "/mutants.rs"));
/// }
/// ```
///
/// It holds a constant for each mutant: `FOR_UPDATE_DOES_NOTHING` of the type `box_office::Mutant`.
///
/// Each mutant is a module of its own with a copy of every module of the level that the patch changes,
/// of the strategy, and of what lies between them. All other modules are the level's own. A copy has
/// no unit tests: they are for the level's own module, and the mistake may well make them fail.
///
/// A patch that does not apply to the working tree is applied to the last commit instead, so that a
/// reader who edits a strategy keeps its mutants. If that fails too, or more than the strategy has been
/// edited, the mutant is a stub that cannot be opened. In both cases cargo prints a warning.
///
/// With [`WITHOUT_MUTANTS`] in the environment every mutant is a stub that says so, and nothing is warned of.
///
/// # Errors
/// A patch cannot be read, or a file cannot be written.
pub fn build() -> anyhow::Result<()> {
    let package = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let root = package.ancestors().nth(2).context("a level lies in levels/")?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    println!("cargo:rerun-if-changed=src");
    println!("cargo:rerun-if-changed=mutants");
    println!("cargo:rerun-if-env-changed={WITHOUT_MUTANTS}");

    let level = Level::read(root, &package)?;
    let copies = out.join("mutants");
    if copies.exists() {
        fs::remove_dir_all(&copies)?;
    }
    let mut generated = String::new();
    for mutant in Mutant::read_all(&package.join("mutants"))? {
        generated += &level.module(&mutant, &copies.join(&mutant.name))?;
    }
    fs::write(out.join("mutants.rs"), generated)?;
    Ok(())
}

/// A level's sources.
struct Level<'a> {
    root: &'a Path,
    /// The folder of the sources from the root of the repository: `levels/lv2-db-lock/src`.
    src: String,
    /// The modules that `lib.rs` declares, each with its files: paths from `src`, and their content.
    modules: BTreeMap<String, Vec<(String, String)>>,
}

impl<'a> Level<'a> {
    fn read(root: &'a Path, package: &Path) -> anyhow::Result<Self> {
        let src = package.join("src");
        let lib = fs::read_to_string(src.join("lib.rs"))?;
        let declared = lib.lines().filter_map(|line| {
            let name = line
                .trim_start_matches("pub ")
                .strip_prefix("mod ")?
                .strip_suffix(';')?;
            Some(name.to_owned())
        });
        let mut modules = BTreeMap::new();
        for name in declared {
            let mut files = vec![];
            for path in [src.join(&name), src.join(&name).with_extension("rs")] {
                read_below(&src, &path, &mut files)?;
            }
            modules.insert(name, files);
        }
        let src = package.strip_prefix(root)?.join("src").display().to_string();
        Ok(Self { root, src, modules })
    }

    /// The module of one mutant and its constant, as source code. Writes the copies that it is made of.
    fn module(&self, mutant: &Mutant, copies: &Path) -> anyhow::Result<String> {
        let Mutant {
            name,
            summary,
            strategy,
            ..
        } = mutant;
        let (module, constant) = (name.replace('-', "_"), name.replace('-', "_").to_uppercase());
        let description = format!("\"mutants/{name}\", {summary:?}");
        let stub = |constructor: &str| {
            let stub = format!("box_office::Mutant::{constructor}({description})");
            Ok(format!(
                "/// {summary}\npub const {constant}: box_office::Mutant = {stub};\n"
            ))
        };
        if env::var_os(WITHOUT_MUTANTS).is_some() {
            return stub("left_out");
        }
        let Some(mutated) = self.mutated(mutant) else {
            return stub("stale");
        };

        let source = strategy.replace('-', "_");
        let copied = self.affected(&source, mutated.keys());
        let mut items = String::new();
        for name in self.modules.keys() {
            if !copied.contains(name) {
                items += &format!("    #[allow(unused_imports)]\n    pub(crate) use crate::{name};\n");
                continue;
            }
            let mut file = String::new();
            for (path, content) in &self.modules[name] {
                let content = mutated.get(path).unwrap_or(content);
                let copy = copies.join(path);
                fs::create_dir_all(copy.parent().context("a copy lies in a folder")?)?;
                let content = content.replace("crate::", &format!("crate::mutants::{module}::"));
                fs::write(&copy, content.replace("#[cfg(test)]", "#[cfg(any())]"))?;
                if *path == format!("{name}.rs") || *path == format!("{name}/mod.rs") {
                    file = copy.display().to_string();
                }
            }
            items += &format!("    #[path = {file:?}]\n    pub mod {name};\n");
        }
        let opened = format!("{module}::{source}::{}", camel_case(&source));
        Ok(format!(
            "/// {summary}\n\
             #[allow(missing_docs, unreachable_pub, dead_code, unused, clippy::all)]\n\
             pub mod {module} {{\n{items}}}\n\
             /// {summary}\n\
             pub const {constant}: box_office::Mutant = box_office::Mutant::of::<{opened}>({description});\n"
        ))
    }

    /// The changed files, by their paths from `src`; none if the patch does not apply.
    fn mutated(&self, mutant: &Mutant) -> Option<BTreeMap<String, String>> {
        let stale = match mutant.apply(|path| fs::read_to_string(self.root.join(path))) {
            Ok(files) => return Some(self.relative_to_src(files)),
            Err(stale) => stale,
        };
        let patch = format!("{}/mutants/{}.patch", self.src.trim_end_matches("/src"), mutant.name);
        let refresh = "`cargo run -p oversold -- source --refresh` makes it anew";
        let before = match self.only_changed(mutant) {
            true => mutant.apply(|path| committed(self.root, "HEAD", path)).ok(),
            false => None,
        };
        let instead = match before {
            Some(_) => "the mutant is made of the last commit instead",
            None => "the mutant is a stub that cannot be opened",
        };
        println!("cargo:warning={patch}: {stale}; {instead}; {refresh}");
        before.map(|files| self.relative_to_src(files))
    }

    /// Whether no source but those that the mutant changes differs from the last commit: then what is
    /// made of the last commit still compiles with the rest.
    fn only_changed(&self, mutant: &Mutant) -> bool {
        let differ = git(
            self.root,
            ["diff", "--name-only", "HEAD", "--", &self.src, "levels/box-office/src"],
        );
        let is_changed = |path: &str| mutant.changes.iter().any(|change| change.path == path);
        differ.is_ok_and(|paths| paths.lines().all(is_changed))
    }

    fn relative_to_src(&self, files: Vec<(String, String)>) -> BTreeMap<String, String> {
        let prefix = format!("{}/", self.src);
        let relative_to_src = |path: String| path.strip_prefix(&prefix).map_or(path.clone(), str::to_owned);
        files
            .into_iter()
            .map(|(path, content)| (relative_to_src(path), content))
            .collect()
    }

    /// The modules of which a mutant needs copies: the strategy, those with a changed file, and those
    /// through which the strategy uses one of them.
    fn affected<'b>(&self, strategy: &str, changed: impl Iterator<Item = &'b String>) -> BTreeSet<String> {
        let module = |path: &String| path.split(['/', '.']).next().unwrap_or_default().to_owned();
        let changed: BTreeSet<String> = changed.map(module).collect();
        let between = self
            .used_by(strategy)
            .into_iter()
            .filter(|name| !self.used_by(name).is_disjoint(&changed));
        let mut affected: BTreeSet<String> = between.collect();
        affected.extend(changed);
        affected.insert(strategy.to_owned());
        affected
    }

    /// The modules that a module uses, directly or not.
    fn used_by(&self, module: &str) -> BTreeSet<String> {
        let mut used = BTreeSet::new();
        let mut open = vec![module];
        while let Some(name) = open.pop() {
            let files = self.modules.get(name).map_or(&[][..], Vec::as_slice);
            for other in self.modules.keys().filter(|other| *other != name) {
                let names = |(_, content): &(String, String)| content.contains(&format!("{other}::"));
                if files.iter().any(names) && used.insert(other.clone()) {
                    open.push(other);
                }
            }
        }
        used
    }
}

/// Reads a file, or all files below a folder. What is not there has none.
fn read_below(src: &Path, path: &Path, files: &mut Vec<(String, String)>) -> anyhow::Result<()> {
    if path.is_dir() {
        let mut entries = fs::read_dir(path)?
            .map(|entry| Ok(entry?.path()))
            .collect::<io::Result<Vec<_>>>()?;
        entries.sort();
        for entry in entries {
            read_below(src, &entry, files)?;
        }
    } else if path.is_file() {
        let content = fs::read_to_string(path).with_context(|| path.display().to_string())?;
        files.push((path.strip_prefix(src)?.display().to_string(), content));
    }
    Ok(())
}

/// `single_writer` as `SingleWriter`.
fn camel_case(name: &str) -> String {
    let capital = |word: &str| word[..1].to_uppercase() + &word[1..];
    name.split('_').filter(|word| !word.is_empty()).map(capital).collect()
}
