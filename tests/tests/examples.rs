//! The examples, run as a user runs them.

use std::collections::HashMap;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use diesel::{MysqlConnection, PgConnection};
use dlock_diesel::{AdvisoryLockExt, LockConnection, LockKey};
use dlock_tests::{
    Kind, PATIENCE, Process, Server, TestConnection, block_on, on_every_network_server, unique_key,
    wait_for,
};
use fresh_database::FreshDatabase;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;
use tokio::time::{sleep, timeout};

mod fresh_database;

trait Lockable: TestConnection + LockConnection {}

impl Lockable for PgConnection {}
impl Lockable for MysqlConnection {}

/// An example, built with the first call, together with the others.
fn example(name: &str) -> Command {
    static PROGRAMS: OnceLock<HashMap<String, PathBuf>> = OnceLock::new();
    let programs = PROGRAMS.get_or_init(build);
    let mut command = Command::new(&programs[name]);
    command.env_remove("DATABASE_URL");
    command
}

/// As `cargo test --workspace --all-features` builds them, so that after it nothing is left to do. (That builds no
/// program of the benchmarks, and neither does this.)
fn build() -> HashMap<String, PathBuf> {
    // TARGET/PROFILE/deps/THIS
    let itself = env::current_exe().expect("the path of this test");
    let folder = itself.ancestors().nth(2).expect("the folder of a profile");
    let profile = match folder.file_name().and_then(|name| name.to_str()) {
        Some("debug") | None => "dev",
        Some(name) => name,
    };
    let output = Command::new(env!("CARGO"))
        .args([
            "build",
            "--workspace",
            "--all-features",
            "--examples",
            "--bin",
            "quickstart",
        ])
        .args(["--profile", profile, "--message-format", "json"])
        .arg("--target-dir")
        .arg(folder.parent().expect("the target folder"))
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs");
    assert!(
        output.status.success(),
        "the examples do not build:\n{}",
        stderr(&output)
    );
    stdout(&output)
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter_map(|message| {
            let name = message["target"]["name"].as_str()?.to_owned();
            Some((name, message["executable"].as_str()?.into()))
        })
        .collect()
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The output of an example that succeeds.
#[track_caller]
fn run(name: &str, url: &str) -> String {
    let output = example(name)
        .env("DATABASE_URL", url)
        .output()
        .expect("it starts");
    assert!(
        output.status.success(),
        "{}\n{}",
        output.status,
        stderr(&output)
    );
    assert_eq!(stderr(&output), "");
    stdout(&output)
}

#[track_caller]
fn assert_lines(output: &str, expected: &[(&str, &str)]) {
    let lines: Vec<&str> = output.lines().collect();
    assert_eq!(lines.len(), expected.len(), "{output}");
    for (line, (start, end)) in lines.iter().zip(expected) {
        assert!(line.starts_with(start) && line.ends_with(end), "{output}");
    }
}

fn axum_export(server: &Server) -> (Process, String) {
    let mut command = example("axum_export");
    command.arg("127.0.0.1:0").env("DATABASE_URL", &server.url);
    let mut process = Process::spawn(command);
    let line = process.line();
    let address = line.strip_prefix("listening on ");
    (process, address.expect("an address").to_owned())
}

fn only_one(server: &Server, arguments: &[&str]) -> Command {
    let mut command = example("only_one");
    command.env("DATABASE_URL", &server.url).args(arguments);
    command
}

#[track_caller]
fn code(command: &mut Command) -> (i32, String) {
    let output = command.output().expect("it starts");
    let code = output.status.code().expect("an exit status of its own");
    (code, stderr(&output))
}

/// What `quickstart` prints, on whatever database.
#[track_caller]
fn assert_tells_what_happens_in_order(output: &str) {
    let lines: Vec<&str> = output.lines().collect();
    let expected = [
        ("1. The first connection acquires lock \"quickstart/", "\"."),
        (
            "2. The second connection asks for it, and does not get it.",
            "",
        ),
        (
            "3. It waits for 250ms, and gives up: lock \"quickstart/",
            ".",
        ),
        ("4. A second process waits for it.", ""),
        ("5. The first connection releases it.", ""),
        ("6. The second process acquires it, after ", " ms."),
        (
            "7. The second process is killed, which frees it: the first connection acquires it.",
            "",
        ),
    ];
    assert_lines(output, &expected);
    assert!(lines[2].contains(": held by "), "{output}");
}

/// What a file has beside it, and its length.
fn beside(path: &Path) -> Vec<(String, u64)> {
    let entries = fs::read_dir(path.parent().expect("a folder")).expect("a folder");
    let mut entries: Vec<_> = entries
        .map(|entry| {
            let entry = entry.expect("an entry");
            let name = entry.file_name().to_string_lossy().into_owned();
            (name, entry.metadata().expect("a file").len())
        })
        .collect();
    entries.sort();
    entries
}

#[test]
fn quickstart_needs_no_server() {
    let folder = TempDir::new().expect("a folder");
    let output = example("quickstart")
        .env("TMPDIR", folder.path())
        .output()
        .expect("it starts");
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(stderr(&output), "");
    let output = stdout(&output);
    let (first, rest) = output.split_once('\n').expect("lines");
    assert_eq!(
        first,
        "There is no DATABASE_URL, so this is SQLite, in a temporary file."
    );
    assert_tells_what_happens_in_order(rest);
    assert!(rest.contains("(quickstart)"), "{rest}");
    assert_eq!(
        beside(&folder.path().join("nothing")),
        [],
        "it leaves nothing behind"
    );
}

#[test]
fn no_example_needs_a_database_library() {
    for name in [
        "quickstart",
        "only_one",
        "once_a_night",
        "migrate_once",
        "transfer",
        "fencing",
        "few_at_once",
        "quickstart_async",
        "leader",
        "axum_export",
        "doctor",
    ] {
        let program = example(name).get_program().to_owned();
        let output = Command::new("ldd").arg(program).output().expect("ldd runs");
        let libraries = stdout(&output);
        assert!(libraries.contains("libc.so"), "{libraries}");
        for library in ["libpq", "mysql", "maria", "sqlite", "ssl"] {
            assert!(!libraries.contains(library), "{name}: {libraries}");
        }
    }
}

#[test]
fn only_one_needs_no_server_but_a_file() {
    let folder = TempDir::new().expect("a folder");
    let file = folder.path().join("jobs");
    let only_one = |arguments: &[&str]| {
        let mut command = example("only_one");
        command.arg("--file").arg(&file).args(arguments);
        command
    };
    let mut holder = Process::spawn_without_servers(only_one(&[
        "nightly",
        "--",
        "sh",
        "-c",
        "echo started; read line",
    ]));
    holder.expect_line("started");
    let (status, stderr) = code(&mut only_one(&[
        "--no-wait",
        "-E",
        "75",
        "nightly",
        "--",
        "echo",
    ]));
    assert_eq!(status, 75, "{stderr}");
    let named = format!("held by {} (only_one)", holder.id());
    assert!(
        stderr.contains("nightly") && stderr.contains(&named),
        "{stderr}"
    );
    assert_eq!(
        code(&mut only_one(&["--no-wait", "other", "--", "true"])).0,
        0
    );
    let mut waiting =
        Process::spawn_without_servers(only_one(&["nightly", "--", "echo", "its turn"]));
    assert!(waiting.is_silent_for(Duration::from_millis(100)));
    holder.kill9();
    waiting.expect_line("its turn");
    assert!(waiting.wait().success());
    assert_eq!(
        beside(&file),
        [("jobs".into(), 0), ("jobs-dlock".into(), 0)]
    );

    let missing = folder.path().join("no/such/folder");
    let output = example("only_one")
        .arg("--file")
        .arg(&missing)
        .args(["key", "--", "true"])
        .output()
        .expect("it starts");
    assert_eq!(output.status.code(), Some(125));
    assert!(
        self::stderr(&output).contains("no/such/folder"),
        "{output:?}"
    );
}

/// What `few_at_once` prints, on whatever database.
#[track_caller]
fn assert_few_are_inside(output: &str) {
    let lines: Vec<&str> = output.lines().collect();
    assert_eq!(lines.len(), 7, "{output}");
    for (number, line) in (1..=6).zip(&lines) {
        let start = format!("Process {number} has slot ");
        assert!(line.starts_with(&start), "{output}");
        assert!(
            line.ends_with("1 inside.") || line.ends_with("2 inside."),
            "{output}"
        );
    }
    assert!(lines[6].ends_with("both are free again."), "{output}");
}

#[test]
fn few_at_once_works_on_sqlite() {
    let folder = TempDir::new().expect("a folder");
    let url = format!("sqlite:{}", folder.path().join("app.db").display());
    assert_few_are_inside(&run("few_at_once", &url));
}

fn once_a_night(url: &str, job: &str, period: &str, script: &str) -> Command {
    let mut command = example("once_a_night");
    command.env("DATABASE_URL", url);
    command.args([job, period, "--", "sh", "-c", script]);
    command
}

/// Three hosts, on whatever database.
#[track_caller]
fn assert_the_job_runs_once_a_night(url: &str) {
    let run = |job: &str, night: &str, script: &str| {
        let output = once_a_night(url, job, night, script)
            .output()
            .expect("it starts");
        let code = output.status.code().expect("an exit status of its own");
        (code, stdout(&output), stderr(&output))
    };
    let (ran, nothing) = (String::from("it runs\n"), String::new());
    // The clock of each host is so late that the one before has finished.
    let nights = ["2026-01-30", "2026-01-31"];
    for night in nights {
        assert_eq!(
            run("a", night, "echo it runs"),
            (0, ran.clone(), nothing.clone())
        );
        for _late in 0..2 {
            let (code, stdout, stderr) = run("a", night, "echo it runs");
            assert_eq!((code, stdout), (0, nothing.clone()), "{stderr}");
            assert_eq!(stderr, format!("a has run for {night}\n"));
        }
    }
    // A job that fails is run again, by the next host.
    let (code, _, _) = run("b", nights[0], "exit 7");
    assert_eq!(code, 7);
    assert_eq!(run("b", nights[0], "echo it runs").1, ran);
    assert_eq!(run("b", nights[0], "echo it runs").1, nothing);

    // The clocks agree.
    let mut hosts: Vec<_> = (0..3)
        .map(|_| {
            let mut host = once_a_night(url, "c", nights[0], "echo it runs");
            host.stdout(Stdio::piped()).stderr(Stdio::null());
            host.spawn().expect("it starts")
        })
        .collect();
    let outputs = hosts
        .drain(..)
        .map(|host| host.wait_with_output().expect("an end"));
    let runs: String = outputs.map(|output| stdout(&output)).collect();
    assert_eq!(runs, ran);
}

#[test]
fn once_a_night_runs_a_job_once_on_sqlite() {
    let folder = TempDir::new().expect("a folder");
    let url = format!("sqlite:{}", folder.path().join("app.db").display());
    assert_the_job_runs_once_a_night(&url);
}

#[test]
fn doctor_tells_where_locks_do_not_exclude() {
    let folder = TempDir::new().expect("a temporary folder");
    let [one, other] = ["app.db", "other.db"].map(|name| folder.path().join(name));
    let url = format!("sqlite:{}", one.display());
    assert!(run("doctor", &url).contains(": locks exclude ("));
    fs::hard_link(&one, &other).expect("a link");
    let output = example("doctor")
        .env("DATABASE_URL", &url)
        .output()
        .expect("the example");
    let text = stdout(&output);
    assert!(
        text.contains("LOCKS DO NOT EXCLUDE HERE") && text.contains("DANGER: lock file: "),
        "{text}"
    );
    assert_eq!(output.status.code(), Some(2), "{text}");
}

#[test]
fn migrate_once_works_on_sqlite() {
    let folder = TempDir::new().expect("a folder");
    let url = format!("sqlite:{}", folder.path().join("app.db").display());
    assert_eq!(
        run("migrate_once", &url),
        "applied 20260101000000\napplied 20260102000000\n"
    );
    assert_eq!(run("migrate_once", &url), "nothing to apply\n");
}

on_every_network_server! {
    fn quickstart_tells_what_happens_in_order<C: Lockable>(server: &Server) {
        assert_tells_what_happens_in_order(&run("quickstart", &server.url));
    }

    fn few_at_once_lets_two_of_six_processes_in_at_a_time<C: Lockable>(server: &Server) {
        assert_few_are_inside(&run("few_at_once", &server.url));
    }

    fn quickstart_async_tells_what_happens_in_order<C: Lockable>(server: &Server) {
        let output = run("quickstart_async", &server.url);
        let expected = [
            ("1. The first connection acquires lock \"quickstart_async/", "\"."),
            ("2. The second connection asks for it, and does not get it.", ""),
            ("3. It waits for 250ms, and gives up: lock \"quickstart_async/", "."),
            ("4. It waits once more, and a timer drops its future after 250ms.", ""),
            ("5. A task with a connection of its own waits for it.", ""),
            ("6. The first connection releases it.", ""),
            ("7. The task acquires it, after ", " ms."),
            ("8. The task is aborted: the lock is free for the first connection.", ""),
        ];
        assert_lines(&output, &expected);
        assert!(output.contains(": held by "), "{output}");
    }

    fn doctor_says_in_the_first_line_that_all_is_well<C: Lockable>(server: &Server) {
        let output = run("doctor", &server.url);
        let first = output.lines().next().expect("a line");
        assert!(first.contains(": locks exclude ("), "{output}");
        assert!(output.lines().skip(1).all(|line| line.starts_with("note: ")), "{output}");
    }

    fn leader_hands_over_to_one_after_the_other<C: Lockable>(server: &Server) {
        let key = unique_key("leader");
        let mut command = example("leader");
        command.arg(&key).env("DATABASE_URL", &server.url);
        let begin = Instant::now();
        let mut process = Process::spawn(command);
        // Each of the first two leads for half a second.
        let mut conn = C::open(server);
        let (done, ends) = mpsc::channel::<()>();
        let watch = thread::spawn(move || {
            let mut leaders = Vec::new();
            while let Err(RecvTimeoutError::Timeout) = ends.recv_timeout(Duration::from_millis(5)) {
                let holders = conn.advisory_lock(&key).holders().expect("the holders");
                let leading: Vec<_> = holders.iter().filter(|holder| holder.granted).collect();
                assert!(leading.len() <= 1, "{leading:?}");
                leaders.extend(leading.iter().map(|leader| leader.backend_id));
                leaders.dedup();
            }
            leaders
        });
        let lines: Vec<_> = (0..6).map(|_| process.line()).collect();
        assert!(process.wait().success());
        let time = begin.elapsed();
        drop(done);
        let leaders = watch.join().expect("never two leaders");
        let output = lines.join("\n");
        let expected = [
            ("Task ", " leads."),
            ("The server knows 1 leader.", ""),
            ("Task ", " ms later."),
            ("The server knows 1 leader.", ""),
            ("Task ", " ms later."),
            ("Task ", " ms after its session had ended."),
        ];
        assert_lines(&output, &expected);
        let words: Vec<_> = output.lines().map(|line| line.split(' ').collect::<Vec<_>>()).collect();
        let [first, aborted, second, ended, third] = [words[0][1], words[2][1], words[2][9], words[4][1], words[4][9]];
        assert_eq!((aborted, ended), (first, second), "{output}");
        assert!(first != second && second != third && first != third, "{output}");
        assert_eq!((words[5][1], words[5][2]), (second, "stopped"), "{output}");
        for hand_over in [words[2][11], words[4][11]] {
            let milliseconds: f64 = hand_over.parse().expect("a number");
            assert!(milliseconds > 0.0 && milliseconds < time.as_secs_f64() * 1000.0, "{output}");
        }
        // What the server has shown agrees: none of them twice. The third one may have ended too soon to be seen.
        assert!(matches!(leaders[..], [first, second] if first != second)
            || matches!(leaders[..], [first, second, third] if first != second && second != third && first != third),
            "{leaders:?}");
    }

    fn axum_export_exports_for_one_client_at_a_time<C: Lockable>(server: &Server) {
        let services = [axum_export(server), axum_export(server)];
        let name = unique_key("axum_export").replace('/', "-");
        let key = LockKey::namespaced("export", &name);
        let mut observer = C::open(server);
        let client = reqwest::Client::builder().no_proxy().build().expect("a client");
        let request = |service: usize, name: &str, seconds: u32| {
            let url = format!("{}/export/{name}?seconds={seconds}", services[service].1);
            client.post(url).send()
        };
        let post = async |service, name: &str| {
            let response = timeout(PATIENCE, request(service, name, 0)).await.expect("an answer in time");
            let response = response.expect("an answer");
            (response.status().as_u16(), response.text().await.expect("a text"))
        };
        block_on(async {
            let (done, busy) = ((200, format!("{name} is exported\n")), (409, format!("{name} is being exported\n")));
            for service in [0, 1, 0] {
                assert_eq!(post(service, &name).await, done);
            }
            let long = tokio::spawn(request(0, &name, 3600));
            // Only looked at: a try could be what makes it busy.
            let mut lock = observer.advisory_lock(key);
            wait_for("the long export to run", || !lock.holders().expect("the holders").is_empty());
            for service in [0, 1, 0] {
                assert_eq!(post(service, &name).await, busy);
            }
            assert_eq!(post(0, &format!("{name}-2")).await.0, 200, "another export can run");

            // The client goes away, and the lock is free.
            long.abort();
            let begin = Instant::now();
            while post(1, &name).await != done {
                assert!(begin.elapsed() < PATIENCE, "the export goes on for nobody");
                sleep(Duration::from_millis(5)).await;
            }
            for service in [0, 1] {
                assert_eq!(post(service, &name).await, done);
            }
        });
    }

    fn axum_export_runs_sixty_exports_at_once_with_a_pool_of_five<C: Lockable>(server: &Server) {
        let (_service, address) = axum_export(server);
        let name = unique_key("sixty").replace('/', "-");
        let client = reqwest::Client::builder().no_proxy().build().expect("a client");
        let mut observer = C::open(server);
        block_on(async {
            let post = |number: u32, seconds: u32| {
                let request = client.post(format!("{address}/export/{name}-{number}?upload={seconds}"));
                tokio::spawn(async move {
                    let response = timeout(PATIENCE, request.send()).await.expect("an answer in time");
                    response.expect("an answer").status().as_u16()
                })
            };
            let exports: Vec<_> = (0..60).map(|number| post(number, 3)).collect();
            for number in 0..60 {
                let key = LockKey::namespaced("export", format!("{name}-{number}"));
                let mut lock = observer.advisory_lock(key);
                wait_for("each export to run", || !lock.holders().expect("the holders").is_empty());
            }
            let duplicates: Vec<_> = (0..60).map(|number| post(number, 3)).collect();
            for duplicate in duplicates {
                assert_eq!(duplicate.await.expect("no panic"), 409);
            }
            for export in exports {
                assert_eq!(export.await.expect("no panic"), 200);
            }
        });
    }

    fn migrate_once_applies_each_migration_in_one_of_five_processes<C: Lockable>(server: &Server) {
        let database = FreshDatabase::<C>::create(server);
        let mut processes: Vec<_> = (0..5)
            .map(|_| {
                let mut command = example("migrate_once");
                command.env("DATABASE_URL", &database.server.url);
                Process::spawn(command)
            })
            .collect();
        let mut lines: Vec<_> = processes.iter_mut().map(Process::line).collect();
        lines.sort();
        let nothing = "nothing to apply";
        assert_eq!(lines, ["applied 20260101000000", nothing, nothing, nothing, nothing]);
        for process in &mut processes {
            assert!(process.wait().success());
        }
        let mut conn = C::open(&database.server);
        assert_eq!(conn.number("SELECT COUNT(*) FROM dlock_visitors"), Some(1));
    }

    fn fencing_rejects_the_write_of_a_holder_that_was_stopped<C: Lockable>(server: &Server) {
        let database = FreshDatabase::<C>::create(server);
        let output = run("fencing", &database.server.url);
        let expected = [
            ("Process 1 holds the lock. Its token is ", "."),
            ("It is stopped. Then its session is ended, so the lock is free.", ""),
            ("Process 2 acquires the lock. Its token is ", ". It changes 1 row."),
            ("Process 1 goes on, and does not know. It changes 0 rows.", ""),
            ("The report is by process 2.", ""),
        ];
        assert_lines(&output, &expected);
        let token = |line: usize| -> i64 {
            let line = output.lines().nth(line).expect("a line");
            let token = line.split("token is ").nth(1).and_then(|rest| rest.split('.').next());
            token.and_then(|token| token.parse().ok()).expect("a token")
        };
        assert!(token(0) < token(2), "{output}");
    }

    fn transfer_loses_money_without_the_lock_only<C: Lockable>(server: &Server) {
        let database = FreshDatabase::<C>::create(server);
        let output = run("transfer", &database.server.url);
        let lines: Vec<&str> = output.lines().collect();
        assert!(matches!(lines[..], [without, with]
            if without.starts_with("without the lock: ") && without.ends_with(" of 1000 lost")
                && !without.contains(": 0 of")
                && with == "with the lock: 0 of 1000 lost"
        ), "{output}");
    }

    fn once_a_night_runs_a_job_on_one_of_three_hosts<C: Lockable>(server: &Server) {
        let database = FreshDatabase::<C>::create(server);
        assert_the_job_runs_once_a_night(&database.server.url);
    }

    fn only_one_says_who_holds_the_lock_and_who_waits<C: Lockable>(server: &Server) {
        let key = unique_key("only_one_who");
        let who = || {
            let output = only_one(server, &["--who", &key]).output().expect("it starts");
            assert!(output.status.success(), "{}", stderr(&output));
            stdout(&output)
        };
        assert_eq!(who(), "no holder is seen\n");
        let mut conn = C::open(server);
        let id = conn.backend_id();
        let lock = conn.advisory_lock(&key).acquire().expect("a free lock");
        let output = who();
        let (held, how) = output.split_once("; to end that session: ").expect("a remedy");
        assert!(held.starts_with(&format!("held by {id} (")), "{output}");
        assert!(held.contains("), busy or idle for "), "{output}");
        assert!(how == format!("SELECT pg_terminate_backend({id})\n") || how == format!("KILL {id}\n"), "{output}");

        let mut waiting = Process::spawn(only_one(server, &[&key, "--", "echo", "started"]));
        // MariaDB does not show who waits.
        if server.kind == Kind::Postgres {
            wait_for("the waiting session to be shown", || who().contains("\nwaited for by "));
        }
        drop(lock);
        waiting.expect_line("started");
        assert!(waiting.wait().success());
    }

    fn only_one_exits_as_its_command_does<C: Lockable>(server: &Server) {
        let key = unique_key("only_one_status");
        for (script, status) in [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137), ("kill -15 $$", 143)] {
            let (code, stderr) = code(&mut only_one(server, &[&key, "--", "sh", "-c", script]));
            assert_eq!((code, &*stderr), (status, ""), "{script}");
        }
        let (code_of_missing, stderr) = code(&mut only_one(server, &[&key, "--", "/no/such/program"]));
        assert!(code_of_missing == 127 && stderr.contains("/no/such/program"), "{code_of_missing} {stderr}");
        let (code_of_folder, stderr) = code(&mut only_one(server, &[&key, "--", "/"]));
        assert!(code_of_folder == 126 && stderr.contains("ermission denied"), "{code_of_folder} {stderr}");
    }

    fn only_one_does_not_start_its_command_while_the_lock_is_taken<C: Lockable>(server: &Server) {
        let key = unique_key("only_one_busy");
        let mut conn = C::open(server);
        let lock = conn.advisory_lock(&key).acquire().expect("a free lock");
        let echo = [&*key, "--", "echo", "started"];
        for (options, status) in [
            (&["--no-wait"][..], 1),
            (&["--no-wait", "-E", "75"], 75),
            (&["--timeout", "0"], 1),
            (&["--timeout", "0.25", "-E", "0"], 0),
        ] {
            let begin = Instant::now();
            let output = only_one(server, &[options, &echo].concat()).output().expect("it starts");
            let stderr = stderr(&output);
            assert_eq!(output.status.code(), Some(status), "{stderr}");
            assert!(stderr.contains(&key) && stderr.contains("held by"), "{stderr}");
            assert_eq!(stdout(&output), "");
            if options[1..] == ["0.25", "-E", "0"] {
                assert!(begin.elapsed() >= Duration::from_millis(250));
            }
        }
        let mut waiting = Process::spawn(only_one(server, &echo));
        assert!(waiting.is_silent_for(Duration::from_millis(200)));
        lock.release().expect("a release");
        waiting.expect_line("started");
        assert!(waiting.wait().success());
    }

    fn only_one_holds_the_lock_until_its_command_has_ended<C: Lockable>(server: &Server) {
        let key = unique_key("only_one_signal");
        let mut conn = C::open(server);
        let script = "trap 'echo asked to end; read line; echo ends; exit 3' TERM; echo started; while :; do sleep 0.05; done";
        let mut process = Process::spawn(only_one(server, &[&key, "--", "sh", "-c", script]));
        process.expect_line("started");
        let pid = Pid::from_raw(process.id().try_into().expect("a process id"));
        // The command hears of the first signal only: a terminal would send the second one to both.
        kill(pid, Signal::SIGTERM).expect("a signal");
        kill(pid, Signal::SIGINT).expect("a signal");
        process.expect_line("asked to end");
        assert!(conn.advisory_lock(&key).try_acquire().expect("a try").is_none());
        process.send("go on");
        process.expect_line("ends");
        assert_eq!(process.wait().code(), Some(3));
        assert!(conn.advisory_lock(&key).try_acquire().expect("a try").is_some());
    }

    fn only_one_tells_that_the_lock_was_lost<C: Lockable>(server: &Server) {
        let key = unique_key("only_one_lost");
        let mut conn = C::open(server);
        let mut process = Process::spawn(only_one(server, &[&key, "--", "sh", "-c", "echo started; read line; exit 0"]));
        process.expect_line("started");
        let holder = conn.advisory_lock(&key).holders().expect("the holder")[0].backend_id;
        conn.kill(holder);
        wait_for("the end of the session", || !conn.is_connected(holder));
        process.send("go on");
        assert_eq!(process.wait().code(), Some(125));
    }

    fn a_wrong_password_is_told_without_the_password<C: Lockable>(server: &Server) {
        let mut url = url::Url::parse(&server.url).expect("the server's URL");
        url.set_password(Some("geheim:1")).expect("a URL with a user");
        assert_bad(url.as_str(), &["cannot connect to", "***@", "test"]);
    }
}

/// Every example ends with a message that has the parts, a remedy, and neither a password nor a panic.
#[track_caller]
fn assert_bad(url: &str, parts: &[&str]) {
    for (name, arguments, status) in [
        ("quickstart", &[][..], 1),
        ("migrate_once", &[], 1),
        ("transfer", &[], 1),
        ("fencing", &[], 1),
        ("quickstart_async", &[], 1),
        ("leader", &[], 1),
        ("axum_export", &[], 1),
        ("doctor", &[], 3),
        ("only_one", &["key", "--", "true"], 125),
        ("once_a_night", &["job", "period", "--", "true"], 125),
    ] {
        let (code, stderr) = code(example(name).args(arguments).env("DATABASE_URL", url));
        assert_eq!(code, status, "{name}: {stderr}");
        for part in parts
            .iter()
            .chain(&["error: ", "Set DATABASE_URL to", "docker compose"])
        {
            assert!(stderr.contains(part), "{name}: {part:?} is not in {stderr}");
        }
        for part in ["panic", "backtrace", "geheim"] {
            assert!(!stderr.contains(part), "{name}: {part:?} is in {stderr}");
        }
    }
}

#[test]
fn a_server_that_is_not_there_is_named() {
    for scheme in ["postgres", "mysql", "mariadb"] {
        let parts = ["cannot connect to", "://test:***@127.0.0.1:1/test"];
        assert_bad(&format!("{scheme}://test:geheim@127.0.0.1:1/test"), &parts);
    }
    let parts = ["cannot connect to", "password=***&user=test"];
    assert_bad(
        "postgres://127.0.0.1:1/test?password=geheim&user=test",
        &parts,
    );
    let parts = ["cannot connect to postgres://test:***@127.0.0.1/test"];
    assert_bad("postgres://test:geheim%zz@127.0.0.1/test", &parts);
}

#[test]
fn an_unknown_kind_of_server_is_named() {
    let parts = ["DATABASE_URL=oracle://test:***@127.0.0.1/test"];
    assert_bad("oracle://test:geheim@127.0.0.1/test", &parts);
    assert_bad(
        "host=127.0.0.1 password=geheim",
        &["DATABASE_URL=host=127.0.0.1 password=***"],
    );
    assert_bad("", &["DATABASE_URL= "]);
}

#[test]
fn a_missing_url_is_named() {
    for (name, arguments) in [
        ("quickstart_async", &[][..]),
        ("leader", &[]),
        ("axum_export", &[]),
        ("migrate_once", &[]),
        ("transfer", &[]),
        ("fencing", &[]),
        ("only_one", &["key", "--", "true"]),
        ("once_a_night", &["job", "period", "--", "true"]),
    ] {
        let (code, stderr) = code(example(name).args(arguments));
        assert_ne!(code, 0);
        assert!(stderr.starts_with("error: DATABASE_URL: "), "{stderr}");
        assert!(stderr.contains("Set DATABASE_URL to"), "{stderr}");
    }
}

#[test]
fn only_one_explains_itself() {
    let output = example("only_one")
        .arg("--help")
        .output()
        .expect("it starts");
    for part in [
        "--timeout <SECONDS>",
        "--no-wait",
        "--who",
        "once_a_night",
        "-E <STATUS>",
        "128 + n",
        "KEY",
    ] {
        assert!(stdout(&output).contains(part), "{}", stdout(&output));
    }
    for arguments in [
        &["key", "true"][..],
        &["--timeout=-1", "key", "--", "true"],
        &["--timeout", "x", "key", "--", "true"],
        &["--who", "key", "--", "true"],
    ] {
        let (code, stderr) = code(example("only_one").args(arguments));
        assert!(code == 2 && stderr.contains("--help"), "{code} {stderr}");
    }
}
