use std::fmt;

use url::Url;

/// The wire protocol and the SQL that a server speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// PostgreSQL.
    Postgres,
    /// MySQL and MariaDB.
    Mysql,
    /// SQLite, which is no server: its connections cannot be killed, counted or set up by others.
    Sqlite,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Postgres => "PostgreSQL",
            Self::Mysql => "MySQL or MariaDB",
            Self::Sqlite => "SQLite",
        })
    }
}

/// A running server, and a database on it.
#[derive(Debug, Clone)]
pub struct Server {
    /// Which connection type opens it.
    pub kind: Kind,
    /// Product and version, for messages: `PostgreSQL 15.18`, `MariaDB 10.11.19`.
    pub name: String,
    /// The path of the file, for SQLite; else with user, password and database, as Diesel's and diesel-async's connections take it.
    pub url: String,
}

impl Server {
    /// Whether this is MariaDB, whose [`Kind`] is [`Kind::Mysql`].
    pub fn is_mariadb(&self) -> bool {
        self.name.starts_with("MariaDB")
    }

    /// Major and minor version, as in `(10, 11)`.
    pub fn version(&self) -> (u32, u32) {
        let version = self.name.rsplit(' ').next().unwrap_or_default();
        let mut numbers = version
            .split(|c: char| !c.is_ascii_digit())
            .map(|n| n.parse().unwrap_or(0));
        (
            numbers.next().unwrap_or_default(),
            numbers.next().unwrap_or_default(),
        )
    }

    /// Host and port.
    pub(crate) fn address(&self) -> (String, u16) {
        let url = Url::parse(&self.url).expect("BUG: URLs are checked before a Server is made");
        let default_port = match self.kind {
            Kind::Postgres => 5432,
            Kind::Mysql => 3306,
            Kind::Sqlite => panic!("SQLite has no address: use `on_every_network_server!`"),
        };
        let host = url.host_str().unwrap_or("127.0.0.1");
        (
            host.trim_matches(['[', ']']).to_owned(),
            url.port().unwrap_or(default_port),
        )
    }

    /// The same user, password, database and parameters at another address.
    pub(crate) fn at(&self, port: u16) -> String {
        let mut url = Url::parse(&self.url).expect("BUG: URLs are checked before a Server is made");
        url.set_host(Some("127.0.0.1"))
            .expect("BUG: an IP address is a host");
        url.set_port(Some(port))
            .expect("BUG: a URL with a host takes a port");
        url.into()
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.name, without_password(&self.url))
    }
}

/// A URL that messages may show.
pub(crate) fn without_password(url: &str) -> String {
    match Url::parse(url) {
        Ok(mut parsed) if parsed.password().is_some() => {
            let _ = parsed.set_password(Some("***"));
            parsed.into()
        }
        Ok(parsed) => parsed.into(),
        // Not a URL: hide whatever stands between the last ':' and '@'.
        Err(_) => match url.rsplit_once('@') {
            Some((before, after)) => {
                let shown = match before.rsplit_once(':') {
                    Some((user, _)) => user,
                    None => before,
                };
                format!("{shown}:***@{after}")
            }
            None => url.to_owned(),
        },
    }
}
