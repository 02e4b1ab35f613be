//! Compares the public API of the published crates with the listings in this package's folder.
//!
//! ```sh
//! cargo run -p dlock-public-api              # compares
//! cargo run -p dlock-public-api -- --update  # writes the listings anew
//! ```
//!
//! A listing has what a user can name with all features on: no `#[doc(hidden)]` item, no blanket impl and no auto trait.
//! Of a trait's impl it has the associated types only, because the trait gives the signatures of the functions.
//!
//! It also checks that a crate exports every type of another dlock crate that its public signatures name.

mod exports;
mod listing;

use std::env;
use std::error::Error;
use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};

use listing::Listing;

/// Imports run from the last to the first.
const PACKAGES: [&str; 3] = ["dlock-core", "dlock-diesel", "dlock-diesel-async"];

const UPDATE: &str = "cargo run -p dlock-public-api -- --update";

fn main() -> ExitCode {
    if let Some(code) = listing::run_as_rustdoc() {
        return code;
    }
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<bool, Box<dyn Error>> {
    let update = match env::args().nth(1).as_deref() {
        None => false,
        Some("--update") => true,
        Some(other) => {
            return Err(format!("unknown argument {other}, the only one is --update").into());
        }
    };
    let target = target_directory()?;
    let mut listings = Vec::new();
    for package in PACKAGES {
        let listing = Listing::build(package, &target, &listings)?;
        listings.push(listing);
    }

    let mut same = true;
    for listing in &listings {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("{}.txt", listing.package));
        if update {
            fs::write(&file, listing.text())?;
        } else {
            same &= is_same(listing, &fs::read_to_string(&file).unwrap_or_default());
        }
    }
    if !same {
        eprintln!(
            "\nIf that is intended, update the listings and commit them with the change:\n\n    {UPDATE}"
        );
    }
    let exported = exports::check(&listings);
    if same && exported {
        println!("the public API is as listed");
    }
    Ok(same && exported)
}

fn is_same(listing: &Listing, old: &str) -> bool {
    let old: Vec<&str> = old.lines().collect();
    let removed = old
        .iter()
        .filter(|line| !listing.lines.iter().any(|new| new == *line))
        .map(|line| ('-', *line));
    let added = listing
        .lines
        .iter()
        .map(String::as_str)
        .filter(|line| !old.contains(line))
        .map(|line| ('+', line));
    let changes: Vec<(char, &str)> = removed.chain(added).collect();
    if changes.is_empty() {
        return true;
    }
    eprintln!(
        "\nthe public API of {} is not as listed (- listed, + found):\n",
        listing.package
    );
    for (sign, line) in changes {
        eprintln!("{sign} {line}");
    }
    false
}

fn target_directory() -> Result<String, Box<dyn Error>> {
    let output = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["metadata", "--locked", "--no-deps", "--format-version", "1"])
        .output()?;
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let directory = metadata["target_directory"]
        .as_str()
        .ok_or("cargo metadata names no target_directory")?;
    Ok(directory.to_owned())
}
