//! What the numbers were measured with.

use std::process::Command;
use std::{fs, thread};

use crate::report::Section;

/// The first line that a program prints, if it is there.
fn line(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().next()?.trim();
    (output.status.success() && !line.is_empty()).then(|| line.to_owned())
}

/// A value of a file in which each line is a name, a colon and a value.
fn value(file: &str, name: &str) -> Option<String> {
    let text = fs::read_to_string(file).ok()?;
    let line = text.lines().find(|line| line.starts_with(name))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// The version of a crate in the lock file.
fn locked(name: &str) -> Option<&'static str> {
    const LOCK: &str = include_str!("../../../Cargo.lock");
    let start = LOCK.find(&format!("\nname = \"{name}\"\nversion = \""))?;
    LOCK[start..].split('"').nth(3)
}

pub(crate) fn describe(servers: &[String], neighbours: Option<&str>) -> Section {
    let mut items = Vec::new();
    let mut row = |what: &str, with: String| items.push(format!("{what}: {with}"));
    let cores = thread::available_parallelism().map_or(0, usize::from);
    let processor =
        value("/proc/cpuinfo", "model name").map_or(String::new(), |name| format!(" of {name}"));
    let memory = value("/proc/meminfo", "MemTotal")
        .and_then(|total| total.strip_suffix(" kB")?.parse::<f64>().ok())
        .map_or(String::new(), |kib| {
            format!(", {:.0} GiB of memory", kib / 1024.0 / 1024.0)
        });
    row(
        "Machine",
        format!("{cores} cores{processor}{memory}; servers and clients on it, over TCP"),
    );
    row("Servers", servers.join(", "));
    let crates: Vec<String> = [
        "diesel",
        "diesel-async",
        "tokio-postgres",
        "mysql_async",
        "sqlx-postgres",
        "tokio",
        "criterion",
    ]
    .into_iter()
    .filter_map(|name| Some(format!("{name} {}", locked(name)?)))
    .collect();
    row("Crates", crates.join(", "));
    let libraries: Vec<String> = [
        line("pg_config", &["--version"]).map(|version| version.replace("PostgreSQL", "libpq")),
        line("pkg-config", &["--modversion", "libmariadb"])
            .map(|version| format!("MariaDB Connector/C {version}")),
    ]
    .into_iter()
    .flatten()
    .collect();
    if !libraries.is_empty() {
        row("C libraries", libraries.join(", "));
    }
    if let Some(versions) = neighbours {
        row("Python", versions.to_owned());
    }
    if let Some(version) = line("rustc", &["--version"]) {
        row("Compiler", format!("{version}, `cargo bench`'s profile"));
    }
    let mut section = Section::new("Measured with");
    section.items(&items);
    section
}
