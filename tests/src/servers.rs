use std::{env, path::Path, sync::OnceLock, thread, time::Instant};

use diesel::{Connection, MysqlConnection, PgConnection};
use url::Url;

use crate::{
    Kind, Server, TestConnection,
    server::without_password,
    start::{start_mysql, start_postgres},
};

const VARIABLE: &str = "TEST_URLS";
const ASYNC_VARIABLE: &str = "TEST_ASYNC_URLS";

/// How to come by servers, for the end of every message about a missing one.
pub(crate) const REMEDY: &str = "run `tests/run`, which installs what the tests need; or \
    `docker compose -f docker/compose.yml up -d --wait` and copy `tests/.env.example` to `tests/.env`; or set \
    TEST_URLS to servers of your own, separated by spaces";

/// The servers to test on: those of `TEST_URLS`, or one PostgreSQL and one MySQL or MariaDB, started at the first call
/// and stopped when this process ends, however it ends.
///
/// # Panics
///
/// If there is no server to test on, with what to do about it: a test never passes by skipping.
pub fn servers() -> &'static [Server] {
    // The failure is kept too, so that every test reports it and none waits for it again.
    static SERVERS: OnceLock<Result<Vec<Server>, String>> = OnceLock::new();
    match SERVERS.get_or_init(|| match configured(VARIABLE)? {
        Some(urls) => servers_from(&urls),
        None => start(),
    }) {
        Ok(servers) => servers,
        Err(message) => panic!("{message}"),
    }
}

/// The servers to test async connections on: those of `TEST_ASYNC_URLS`, or else [`servers`].
///
/// # Panics
///
/// As [`servers`].
pub fn async_servers() -> &'static [Server] {
    static SERVERS: OnceLock<Result<Option<Vec<Server>>, String>> = OnceLock::new();
    let named = SERVERS.get_or_init(|| match configured(ASYNC_VARIABLE)? {
        Some(urls) => named_in(ASYNC_VARIABLE, &urls).map(Some),
        None => Ok(None),
    });
    match named {
        Ok(Some(servers)) => servers,
        Ok(None) => servers(),
        Err(message) => panic!("{message}"),
    }
}

/// [`servers`] as a value of `TEST_URLS`, so that child processes use the same ones.
pub fn test_urls() -> String {
    let urls: Vec<&str> = servers().iter().map(|server| server.url.as_str()).collect();
    urls.join(" ")
}

/// The servers that a value of `TEST_URLS` names.
///
/// # Errors
///
/// If the list is empty, or names a URL that cannot be read or a server that does not answer; the message says which
/// (without its password) and what to do.
pub fn servers_from(urls: &str) -> Result<Vec<Server>, String> {
    named_in(VARIABLE, urls)
}

fn named_in(variable: &str, urls: &str) -> Result<Vec<Server>, String> {
    let servers: Vec<Server> = urls
        .split_whitespace()
        .map(|url| {
            let (kind, url) = parse(variable, url)?;
            connect(kind, url)
        })
        .collect::<Result<_, _>>()?;
    if servers.is_empty() {
        return Err(format!(
            "{variable} is {urls:?} and names no server: unset it, or {REMEDY}"
        ));
    }
    Ok(servers)
}

/// The value of `TEST_URLS` or the like: the environment's, else that of the file `.env`.
fn configured(variable: &str) -> Result<Option<String>, String> {
    match env::var(variable) {
        Ok(urls) => return Ok(Some(urls)),
        Err(env::VarError::NotPresent) => {}
        Err(error) => return Err(format!("{variable}: {error}")),
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(".env");
    if !path.exists() {
        return Ok(None);
    }
    let in_file = |error| format!("{}: {error}", path.display());
    // Read, not loaded: changing the environment of a process with threads is not sound.
    for entry in dotenvy::from_path_iter(&path).map_err(in_file)? {
        let (name, value) = entry.map_err(in_file)?;
        if name == variable {
            return Ok(Some(value));
        }
    }
    Ok(None)
}

fn parse(variable: &str, url: &str) -> Result<(Kind, String), String> {
    let shown = without_password(url);
    let usage = "expected postgres://user:password@host:port/database or mysql://user:password@host:port/database";
    let parsed = Url::parse(url)
        .map_err(|error| format!("{variable} has {shown:?}, which is no URL ({error}): {usage}"))?;
    let kind = match parsed.scheme() {
        "postgres" | "postgresql" => Kind::Postgres,
        "mysql" | "mariadb" => Kind::Mysql,
        other => {
            return Err(format!(
                "{variable} has {shown:?}, whose scheme {other:?} is unknown: {usage}"
            ));
        }
    };
    if parsed.host_str().is_none_or(str::is_empty) {
        return Err(format!(
            "{variable} has {shown:?}, which names no host: {usage}"
        ));
    }
    // Clients know one scheme only.
    let url = match url.strip_prefix("mariadb:") {
        Some(rest) => format!("mysql:{rest}"),
        None => url.to_owned(),
    };
    Ok((kind, url))
}

/// Asks the server at `url` for its name.
pub(crate) fn connect(kind: Kind, url: String) -> Result<Server, String> {
    let answer = match kind {
        Kind::Postgres => PgConnection::establish(&url).map(|mut conn| {
            let version = conn
                .text("SELECT current_setting('server_version')")
                .expect("a server has a version");
            format!(
                "PostgreSQL {}",
                version.split(' ').next().unwrap_or_default()
            )
        }),
        Kind::Mysql => MysqlConnection::establish(&url).map(|mut conn| {
            let version = conn
                .text("SELECT VERSION()")
                .expect("a server has a version");
            let number = version.split('-').next().unwrap_or_default();
            let product = if version.contains("MariaDB") {
                "MariaDB"
            } else {
                "MySQL"
            };
            format!("{product} {number}")
        }),
        Kind::Sqlite => unreachable!("BUG: SQLite is in no list"),
    };
    match answer {
        Ok(name) => Ok(Server { kind, name, url }),
        Err(error) => Err(format!(
            "no {kind} server answers at {}: {error}\nStart it, or {REMEDY}",
            without_password(&url)
        )),
    }
}

fn start() -> Result<Vec<Server>, String> {
    let begin = Instant::now();
    let started = thread::scope(|scope| {
        [scope.spawn(start_postgres), scope.spawn(start_mysql)]
            .map(|thread| thread.join().expect("BUG: starting a server panicked"))
    });
    let (servers, failures): (Vec<_>, Vec<_>) = started.into_iter().partition(Result::is_ok);
    let failures: Vec<String> = failures.into_iter().filter_map(Result::err).collect();
    if !failures.is_empty() {
        return Err(format!(
            "{}\nTo have every server: {REMEDY}",
            failures.join("\n")
        ));
    }
    let servers: Vec<Server> = servers.into_iter().flatten().collect();
    let names: Vec<&str> = servers.iter().map(|server| server.name.as_str()).collect();
    eprintln!(
        "started {} in {:.1} s",
        names.join(" and "),
        begin.elapsed().as_secs_f64()
    );
    Ok(servers)
}
