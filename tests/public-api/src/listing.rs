//! The listing of one crate, from what rustdoc says of it.

use std::collections::{BTreeSet, HashSet};
use std::env;
use std::error::Error;
use std::path::Path;
use std::process::{Command, ExitCode};

use public_api::tokens::Token;
use public_api::{Builder, PublicItem};

/// Set for cargo, which passes it on to what it runs as rustdoc: this program.
const REAL_RUSTDOC: &str = "DLOCK_REAL_RUSTDOC";

pub(crate) struct Listing {
    pub(crate) package: &'static str,
    /// The package's name as paths have it.
    pub(crate) name: String,
    pub(crate) lines: Vec<String>,
}

impl Listing {
    /// `others`: the listings of what the package imports.
    pub(crate) fn build(
        package: &'static str,
        target: &str,
        others: &[Listing],
    ) -> Result<Self, Box<dyn Error>> {
        let name = package.replace('-', "_");
        let json = Path::new(target).join("doc").join(format!("{name}.json"));
        write_json(package)?;
        let api = Builder::from_rustdoc_json(&json)
            .omit_blanket_impls(true)
            .omit_auto_trait_impls(true)
            .build();
        let api = api.map_err(|error| {
            format!(
                "cannot read {}: {error}\nWhere rustdoc writes another format, change the version of public-api in \
                 tests/public-api/Cargo.toml",
                json.display()
            )
        })?;
        let items: Vec<&PublicItem> = api.items().collect();
        let mut lines = lines(&items);
        for other in others {
            for line in &mut lines {
                *line = other.shorten(line);
            }
        }
        Ok(Self {
            package,
            name,
            lines,
        })
    }

    /// The types and traits that the crate lists.
    pub(crate) fn items(&self) -> BTreeSet<&str> {
        self.lines
            .iter()
            .filter_map(|line| item(line, &self.name))
            .collect()
    }

    /// The types and traits of other crates that the crate exports.
    pub(crate) fn reexports(&self) -> BTreeSet<&str> {
        let lines = self
            .lines
            .iter()
            .filter(|line| line.starts_with("pub use "));
        lines.filter_map(|line| item(line, &self.name)).collect()
    }

    /// The line with this crate's types as users know them. rustdoc says in which file another crate defines a type,
    /// which is nothing that users rely on.
    fn shorten(&self, line: &str) -> String {
        let items = self.items();
        let mut text = line.to_owned();
        for path in paths(line, &self.name) {
            if let Some(name) = first_type(path).filter(|name| items.contains(name)) {
                let end = path.find(name).expect("BUG: the name is from the path") + name.len();
                text = text.replace(&path[..end], &format!("{}::{name}", self.name));
            }
        }
        text
    }

    pub(crate) fn text(&self) -> String {
        self.lines.iter().map(|line| format!("{line}\n")).collect()
    }
}

/// Has rustdoc write its JSON, which only an unstable option makes it do.
///
/// `RUSTC_BOOTSTRAP` is set for rustdoc alone: build scripts look at it, so that cargo with it would build all
/// dependencies anew, and once more without it.
fn write_json(package: &str) -> Result<(), Box<dyn Error>> {
    let status = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args([
            "rustdoc",
            "--locked",
            "--quiet",
            "--lib",
            "--all-features",
            "--package",
            package,
        ])
        .args(["--", "-Z", "unstable-options", "--output-format", "json"])
        .env(
            REAL_RUSTDOC,
            env::var_os("RUSTDOC").unwrap_or_else(|| "rustdoc".into()),
        )
        .env("RUSTDOC", env::current_exe()?)
        .status()?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("rustdoc failed for {package}").into())
    }
}

/// What this program does where cargo runs it as rustdoc.
pub(crate) fn run_as_rustdoc() -> Option<ExitCode> {
    let rustdoc = env::var_os(REAL_RUSTDOC)?;
    let status = Command::new(rustdoc)
        .args(env::args_os().skip(1))
        .env("RUSTC_BOOTSTRAP", "1")
        .status();
    Some(match status {
        Ok(status) if status.success() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("cannot run rustdoc: {error}");
            ExitCode::FAILURE
        }
    })
}

fn lines(items: &[&PublicItem]) -> Vec<String> {
    let is_trait_impl = |line: &str| line.starts_with("impl") && line.contains(" for ");
    let trait_impls: HashSet<_> = items
        .iter()
        .filter(|item| is_trait_impl(&render(item)))
        .map(|item| item.id())
        .collect();
    // An impl of one type for another stands in the docs of both.
    let mut seen = HashSet::new();
    items
        .iter()
        .filter(|item| {
            let of_trait_impl = item
                .parent_id()
                .is_some_and(|parent| trait_impls.contains(&parent));
            !of_trait_impl
                || item
                    .tokens()
                    .any(|token| *token == Token::Kind("type".to_owned()))
        })
        .map(|item| render(item))
        // What `#[derive(PartialEq)]` adds for the compiler.
        .filter(|line| !line.starts_with("impl core::marker::StructuralPartialEq for "))
        .filter(|line| seen.insert(line.clone()))
        .collect()
}

/// The item's text, with the colon that public-api leaves out of bounds like `DerefMut<Target: Connection>`.
fn render(item: &PublicItem) -> String {
    let mut text = String::new();
    let mut after_name = false;
    for token in item.tokens() {
        if after_name && !matches!(token, Token::Symbol(_) | Token::Whitespace) {
            text.push_str(": ");
        }
        text.push_str(token.text());
        after_name = matches!(token, Token::Identifier(_));
    }
    text
}

/// The type or trait that the line of a listing is about, where it is not an impl.
pub(crate) fn item<'a>(line: &'a str, package: &str) -> Option<&'a str> {
    if line.starts_with("impl") {
        return None;
    }
    paths(line, package).next().and_then(first_type)
}

/// The types and traits of a crate that a line names.
pub(crate) fn types<'a>(line: &'a str, package: &str) -> impl Iterator<Item = &'a str> {
    paths(line, package).filter_map(first_type)
}

/// The paths in a line that begin with the crate.
fn paths<'a>(line: &'a str, package: &str) -> impl Iterator<Item = &'a str> {
    line.split(|c: char| !(c.is_alphanumeric() || c == '_' || c == ':'))
        .map(|path| path.trim_end_matches(':'))
        .filter(move |path| path.split("::").next() == Some(package))
}

/// What is capitalized in a path: after it come its variants, fields and functions.
fn first_type(path: &str) -> Option<&str> {
    path.split("::")
        .find(|part| part.starts_with(|c: char| c.is_uppercase()))
}
