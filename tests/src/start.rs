//! Starts servers from programs found on the machine, and ties their lives to that of this process.

use std::{
    env,
    ffi::OsStr,
    fs,
    io::Read,
    net::TcpListener,
    os::unix::{fs::chown, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};

use diesel::{Connection, PgConnection, connection::SimpleConnection};
use nix::unistd::{User, geteuid};

use crate::{Kind, Server, servers::connect};

/// Until a server must answer; machines that build at the same time are slow.
const PATIENCE: Duration = Duration::from_secs(90);

/// While these are open the servers run: the system closes them when the process ends, in whatever way.
/// `std` opens pipes close-on-exec, so child processes do not keep them open.
static LIFELINES: Mutex<Vec<ChildStdin>> = Mutex::new(Vec::new());

/// Keeps a pipe open until this process ends.
pub(crate) fn tie_to_this_process(lifeline: ChildStdin) {
    LIFELINES
        .lock()
        .expect("nobody panics with it")
        .push(lifeline);
}

pub(crate) fn start_postgres() -> Result<Server, String> {
    start_postgres_with("", "")
}

/// One more PostgreSQL, which is in recovery, as a standby is, until this process ends.
///
/// # Panics
///
/// If it cannot be started.
pub fn start_standby_postgres() -> Server {
    match start_postgres_with("", "yes") {
        Ok(server) => server,
        Err(message) => panic!("{message}"),
    }
}

/// One more PostgreSQL, with these options on its command line, until this process ends. It speaks German after
/// `SET lc_messages = 'de_DE.UTF-8'`.
///
/// # Panics
///
/// If it cannot be started.
pub fn start_extra_postgres(options: &str) -> Server {
    match start_postgres_with(options, "") {
        Ok(server) => server,
        Err(message) if message.contains("pg_stat_statements") => panic!(
            "{message}\nInstall PostgreSQL's contrib modules: the package `postgresql-contrib`, where they are not in \
             the server's own"
        ),
        Err(message) => panic!("{message}"),
    }
}

/// One more PostgreSQL, which is started again whenever it ends, until this process ends. What it has committed is there
/// again.
///
/// # Errors
///
/// If it cannot be started.
pub fn start_lasting_postgres() -> Result<Server, String> {
    start_postgres_again(
        "-c synchronous_commit=on -c max_locks_per_transaction=10",
        "",
        "yes",
    )
}

/// One more MySQL or MariaDB, which is started again whenever it ends, until this process ends. What it has committed is
/// there again.
///
/// # Errors
///
/// If it cannot be started.
pub fn start_lasting_mysql() -> Result<Server, String> {
    start_mysql_again("--innodb-flush-log-at-trx-commit=2", "yes")
}

fn start_postgres_with(options: &str, standby: &str) -> Result<Server, String> {
    start_postgres_again(options, standby, "")
}

fn start_postgres_again(options: &str, standby: &str, again: &str) -> Result<Server, String> {
    let initdb = find("initdb").ok_or("found no PostgreSQL: no program `initdb`")?;
    let postgres = initdb.with_file_name("postgres");
    start(
        "postgres",
        include_str!("start/postgres.sh"),
        &[
            ("INITDB", initdb.as_ref()),
            ("SERVER", postgres.as_ref()),
            ("OPTIONS", options.as_ref()),
            ("STANDBY", standby.as_ref()),
            ("AGAIN", again.as_ref()),
        ],
        |port| {
            let url = |database| format!("postgres://test:test@127.0.0.1:{port}/{database}");
            if !standby.is_empty() {
                return connect(Kind::Postgres, url("test"));
            }
            // `initdb` has no option for a database of one's own.
            PgConnection::establish(&url("postgres"))
                .map_err(|error| error.to_string())?
                .batch_execute("CREATE DATABASE test")
                .map_err(|error| error.to_string())?;
            connect(Kind::Postgres, url("test"))
        },
    )
}

/// One more MariaDB, which is the only node of a Galera cluster, until this process ends.
///
/// # Panics
///
/// If it cannot be started.
pub fn start_galera_node() -> Server {
    let provider = [
        "/usr/lib/galera",
        "/usr/lib64/galera-4",
        "/usr/lib64/galera",
        "/usr/lib",
    ]
    .map(|folder| format!("{folder}/libgalera_smm.so"))
    .into_iter()
    .find(|path| Path::new(path).exists());
    let Some(provider) = provider else {
        panic!(
            "found no libgalera_smm.so: install the package `galera-4`, which MariaDB's server often brings"
        );
    };
    let port = free_port().expect("a free port");
    let options = format!(
        "--wsrep-on=ON --wsrep-provider={provider} --wsrep-cluster-address=gcomm:// --binlog-format=ROW \
         --wsrep-node-address=127.0.0.1 --wsrep-provider-options=base_port={port} --wsrep-sst-method=rsync"
    );
    match start_mysql_with(&options) {
        Ok(server) => server,
        Err(message) => panic!("{message}"),
    }
}

pub(crate) fn start_mysql() -> Result<Server, String> {
    start_mysql_with("")
}

fn start_mysql_with(options: &str) -> Result<Server, String> {
    start_mysql_again(options, "")
}

fn start_mysql_again(options: &str, again: &str) -> Result<Server, String> {
    let server = find("mariadbd")
        .or_else(|| find("mysqld"))
        .ok_or("found no MySQL or MariaDB: no program `mysqld` or `mariadbd`")?;
    let server = fs::canonicalize(&server).unwrap_or(server);
    let version = Command::new(&server)
        .args(["--no-defaults", "--version"])
        .output()
        .map_err(|error| format!("{}: {error}", server.display()))?;
    // Debian's MariaDB also has a program `mysqld`.
    let install = if String::from_utf8_lossy(&version.stdout).contains("MariaDB") {
        find("mariadb-install-db")
            .or_else(|| find("mysql_install_db"))
            .ok_or_else(|| {
                format!(
                    "found {}, but no program `mariadb-install-db`",
                    server.display()
                )
            })?
    } else {
        PathBuf::new()
    };
    start(
        "mysql",
        include_str!("start/mysql.sh"),
        &[
            ("SERVER", server.as_ref()),
            ("INSTALL", install.as_ref()),
            ("OPTIONS", options.as_ref()),
            ("AGAIN", again.as_ref()),
        ],
        |port| {
            connect(
                Kind::Mysql,
                format!("mysql://test:test@127.0.0.1:{port}/test"),
            )
        },
    )
}

/// Runs `script` (which defines `setup` and `serve`) under `supervise.sh` until `ready` connects.
fn start(
    user: &str,
    script: &str,
    variables: &[(&str, &OsStr)],
    ready: impl Fn(u16) -> Result<Server, String>,
) -> Result<Server, String> {
    let mut attempt = 1;
    loop {
        let result = start_once(user, script, variables, &ready);
        match result {
            // Somebody took the port between our choosing it and the server's.
            Err(message) if attempt < 5 && message.contains("Address already in use") => {
                attempt += 1
            }
            result => return result,
        }
    }
}

fn start_once(
    user: &str,
    script: &str,
    variables: &[(&str, &OsStr)],
    ready: &impl Fn(u16) -> Result<Server, String>,
) -> Result<Server, String> {
    let failed = |error: &dyn std::fmt::Display| format!("cannot start {user}: {error}");
    let folder = tempfile::Builder::new()
        .prefix("dlock-")
        .tempdir()
        .map_err(|error| failed(&error))?;
    let port = free_port().map_err(|error| failed(&error))?;

    let mut command = Command::new("sh");
    command
        .args([
            "-c",
            &format!("{script}\n{}", include_str!("start/supervise.sh")),
        ])
        .env("FOLDER", folder.path())
        .env("PORT", port.to_string())
        .env("LC_ALL", "C")
        .envs(variables.iter().copied())
        .current_dir(folder.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        // Ctrl-C at the terminal is for the test process; the servers follow by its end.
        .process_group(0);
    // Database servers refuse to run as root.
    if geteuid().is_root() {
        let user = [user, "nobody"]
            .into_iter()
            .find_map(|name| User::from_name(name).ok().flatten())
            .ok_or_else(|| failed(&"running as root, and found no user `nobody` to run it as"))?;
        chown(
            folder.path(),
            Some(user.uid.as_raw()),
            Some(user.gid.as_raw()),
        )
        .map_err(|error| failed(&error))?;
        command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
    }
    let mut supervisor = command.spawn().map_err(|error| failed(&error))?;
    // From here on the supervisor deletes it.
    let folder = folder.keep();
    let lifeline = supervisor.stdin.take().expect("BUG: stdin is piped");

    let begin = Instant::now();
    loop {
        if supervisor
            .try_wait()
            .map_err(|error| failed(&error))?
            .is_some()
        {
            return Err(failed(&output(&mut supervisor)));
        }
        // A port that accepts, first: clients are slow to give up, and may write to standard error.
        let error = match std::net::TcpStream::connect(("127.0.0.1", port)) {
            Ok(_) => match ready(port) {
                Ok(server) => {
                    LIFELINES
                        .lock()
                        .unwrap_or_else(|poison| poison.into_inner())
                        .push(lifeline);
                    return Ok(server);
                }
                Err(error) => error,
            },
            Err(error) => error.to_string(),
        };
        if begin.elapsed() > PATIENCE {
            return Err(failed(&format!(
                "no answer within {} s ({error}); its log is in {}",
                PATIENCE.as_secs(),
                folder.display()
            )));
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// What a supervisor that ended had to say: the end of the server's log.
fn output(supervisor: &mut Child) -> String {
    let mut text = String::new();
    if let Some(stdout) = &mut supervisor.stdout {
        let _ = stdout.read_to_string(&mut text);
    }
    text
}

fn free_port() -> std::io::Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

/// A program of the `PATH`, or of the folders where packages put servers.
fn find(program: &str) -> Option<PathBuf> {
    let mut folders: Vec<PathBuf> = env::var_os("PATH")
        .map(|path| env::split_paths(&path).collect())
        .unwrap_or_default();
    for parent in ["/usr/lib/postgresql", "/opt/homebrew/opt", "/usr/local/opt"] {
        let mut versions: Vec<PathBuf> = fs::read_dir(parent)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .collect();
        versions.sort_by_key(|path| std::cmp::Reverse(number(path)));
        folders.extend(versions.into_iter().map(|path| path.join("bin")));
    }
    folders.extend(
        [
            "/usr/sbin",
            "/usr/local/sbin",
            "/usr/local/bin",
            "/usr/local/mysql/bin",
            "/usr/local/pgsql/bin",
        ]
        .map(PathBuf::from),
    );
    let folders = env::join_paths(folders).ok()?;
    which::which_in_global(program, Some(folders)).ok()?.next()
}

/// The version in a path such as `/usr/lib/postgresql/15` or `/opt/homebrew/opt/postgresql@17`.
fn number(path: &Path) -> u32 {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let digits = name.rsplit(|c: char| !c.is_ascii_digit()).next();
    digits.unwrap_or_default().parse().unwrap_or(0)
}
