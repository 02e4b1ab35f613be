//! Which server `DATABASE_URL` names, and messages that say what to do.

use std::env;
use std::error::Error;
use std::ops::Range;
use std::process::ExitCode;

pub(crate) type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// What `main` ends with: an error becomes a message.
pub(crate) fn exit_code(result: Result<ExitCode>, on_error: u8) -> ExitCode {
    result.unwrap_or_else(|error| {
        eprintln!("error: {error}");
        on_error.into()
    })
}

/// The message for a connection that was refused.
pub(crate) fn cannot_connect(url: &str, error: &dyn Error) -> Box<dyn Error + Send + Sync> {
    let shown = without_password(url);
    let mut error = error.to_string().replace(url, &shown);
    if let Some(password) = password(url).map(|range| &url[range]) {
        if !shown.contains(password) {
            error = error.replace(password, "***");
        }
    }
    format!("cannot connect to {shown}: {}\n{REMEDY}", error.trim_end()).into()
}

const REMEDY: &str = "\
Set DATABASE_URL to postgres://USER:PASSWORD@HOST:PORT/DATABASE, or mysql:// and so on, of a server that runs.
If you have none: docker compose -f docker/compose.yml up -d --wait
starts PostgreSQL at postgres://test:test@127.0.0.1:15432/test,
MySQL at mysql://test:test@127.0.0.1:13306/test and MariaDB at mysql://test:test@127.0.0.1:13307/test.";

pub(crate) enum Database {
    Postgres(String),
    Mysql(String),
}

impl Database {
    pub(crate) fn from_env() -> Result<Self> {
        let url = env::var("DATABASE_URL")
            .map_err(|error| format!("DATABASE_URL: {error}.\n{REMEDY}"))?;
        match url.split_once("://") {
            Some(("postgres" | "postgresql", _)) => Ok(Self::Postgres(url)),
            Some(("mysql", _)) => Ok(Self::Mysql(url)),
            Some(("mariadb", rest)) => Ok(Self::Mysql(format!("mysql://{rest}"))),
            _ => {
                let shown = without_password(&url);
                Err(format!("DATABASE_URL={shown} is no server of a known kind.\n{REMEDY}").into())
            }
        }
    }
}

fn without_password(url: &str) -> String {
    let mut url = url.to_owned();
    if let Some(range) = password(&url) {
        url.replace_range(range, "***");
    }
    url
}

/// Where the password is: `scheme://user:HERE@host`, or `password=HERE` among the parameters.
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
