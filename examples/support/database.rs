//! The database that `DATABASE_URL` names, and SQLite.

use std::env;
use std::error::Error;
use std::ops::Range;
use std::path::Path;
use std::process::ExitCode;

use diesel::prelude::*;
use dlock_diesel::{LockConnection, SqliteLocksExt};
use tempfile::TempDir;

pub(crate) type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// The exit code of `main`. Prints an error first.
pub(crate) fn exit_code(result: Result<ExitCode>, on_error: u8) -> ExitCode {
    result.unwrap_or_else(|error| {
        eprintln!("error: {error}");
        on_error.into()
    })
}

/// A connection that can take locks after `set_up`.
pub(crate) trait Connect: LockConnection {
    /// Stands before the path or URL in `DATABASE_URL`.
    const PREFIX: &str = "";

    fn set_up(&mut self) -> Result<()> {
        Ok(())
    }
}

impl Connect for SqliteConnection {
    const PREFIX: &str = "sqlite:";

    fn set_up(&mut self) -> Result<()> {
        // SQLite has no advisory locks, so dlock adds them to each connection.
        Ok(self.enable_advisory_locks()?)
    }
}

pub(crate) fn connect<C: Connect>(url: &str) -> Result<C> {
    let mut conn = C::establish(url).map_err(|error| cannot_connect(url, &error))?;
    conn.set_up()?;
    Ok(conn)
}

pub(crate) fn cannot_connect(url: &str, error: &dyn Error) -> String {
    let shown = without_password(url);
    let mut error = error.to_string().replace(url, &shown);
    if let Some(password) = password(url).map(|range| &url[range]) {
        if !shown.contains(password) {
            error = error.replace(password, "***");
        }
    }
    format!("cannot connect to {shown}: {}\n{REMEDY}", error.trim_end())
}

pub(crate) const REMEDY: &str = "\
Set DATABASE_URL to postgres://USER:PASSWORD@HOST:PORT/DATABASE, mysql://USER:PASSWORD@HOST:PORT/DATABASE
or sqlite:PATH. The server must be running. If you have none, run: docker compose -f docker/compose.yml up -d --wait
It starts PostgreSQL at postgres://test:test@127.0.0.1:15432/test,
MySQL at mysql://test:test@127.0.0.1:13306/test and MariaDB at mysql://test:test@127.0.0.1:13307/test.";

pub(crate) enum Database {
    Postgres(String),
    Mysql(String),
    /// The path, and the folder to delete at the end.
    Sqlite(String, Option<TempDir>),
}

impl Database {
    /// The database that `DATABASE_URL` names.
    pub(crate) fn from_env() -> Result<Self> {
        let url = env::var("DATABASE_URL")
            .map_err(|error| format!("DATABASE_URL: {error}.\n{REMEDY}"))?;
        match url.split_once(':') {
            Some(("postgres" | "postgresql", _)) => Ok(Self::Postgres(url)),
            Some(("mysql", _)) => Ok(Self::Mysql(url)),
            Some(("mariadb", rest)) => Ok(Self::Mysql(format!("mysql:{rest}"))),
            Some(("sqlite", path)) => Ok(Self::Sqlite(path.into(), None)),
            _ => {
                let shown = without_password(&url);
                Err(format!(
                    "DATABASE_URL={shown} does not name a known kind of database.\n{REMEDY}"
                )
                .into())
            }
        }
    }

    /// This file. SQLite creates it if it is missing.
    pub(crate) fn sqlite(path: &Path) -> Result<Self> {
        let path = path.to_str().ok_or("the file's path is not UTF-8")?;
        if path.is_empty() || path.starts_with([':']) {
            return Err(format!("{path:?} is not a file").into());
        }
        // Not `file:`, which SQLite reads as a URI.
        Ok(Self::Sqlite(path.into(), None))
    }

    /// The database that `DATABASE_URL` names, or else SQLite in a temporary file.
    pub(crate) fn from_env_or_sqlite() -> Result<Self> {
        if env::var_os("DATABASE_URL").is_some() {
            return Self::from_env();
        }
        let folder = TempDir::new()?;
        let path = folder.path().join("example.db");
        println!("There is no DATABASE_URL, so this is SQLite, in a temporary file.");
        Ok(Self::Sqlite(path.to_string_lossy().into(), Some(folder)))
    }
}

fn without_password(url: &str) -> String {
    let mut url = url.to_owned();
    if let Some(range) = password(&url) {
        url.replace_range(range, "***");
    }
    url
}

/// The place of the password: `scheme://user:HERE@host`, or `password=HERE` among the parameters.
fn password(url: &str) -> Option<Range<usize>> {
    let user = url.find("://").map_or(0, |at| at + 3);
    let before_host = || {
        let end = user + url[user..].rfind('@')?;
        let start = user + url[user..end].find(':')? + 1;
        Some(start..end)
    };
    let parameter = || {
        let start = url.find("password=")? + "password=".len();
        let length = url[start..].find(['&', ' ']).unwrap_or(url.len() - start);
        Some(start..start + length)
    };
    before_host()
        .or_else(parameter)
        .filter(|range| !range.is_empty())
}
