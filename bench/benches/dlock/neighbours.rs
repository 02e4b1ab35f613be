use std::cell::RefCell;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use dlock_tests::{Kind, Server, unique_key};

use crate::duel::Outcome;
use crate::hand_over::HandOver;
use crate::processor::OneProcessor;
use crate::report::{Section, ratio, spread};
use crate::session::{Api, How, Sqlx};
use crate::uncontended::pair;
use crate::{Bench, slug};

/// A Python with sqlalchemy-dlock.
pub(crate) struct Python {
    program: PathBuf,
    versions: String,
}

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/neighbours.py");

impl Python {
    /// Makes a virtual environment, or says why there is none.
    pub(crate) fn install(folder: &Path) -> Result<Self, String> {
        let folder = folder.join("python");
        let program = folder.join("bin/python");
        if !program.exists() {
            output_of(Command::new("python3").args(["-m", "venv"]).arg(&folder))?;
        }
        let packages = ["sqlalchemy-dlock", "psycopg2-binary", "pymysql[rsa]"];
        output_of(
            Command::new(&program)
                .args(["-m", "pip", "install", "--quiet"])
                .args(packages),
        )?;
        let versions = output_of(Command::new(&program).arg(SCRIPT))?;
        Ok(Self {
            program,
            versions: versions.trim().to_owned(),
        })
    }

    pub(crate) fn versions(&self) -> &str {
        &self.versions
    }

    /// sqlalchemy-dlock on connections to `server`.
    fn connect(&self, server: &Server, processor: &mut OneProcessor) -> Neighbour {
        let mut child = Command::new(&self.program)
            .args([SCRIPT, &server.url, &unique_key("bench/python")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the Python that has just been tried starts");
        let mut neighbour = Neighbour {
            stdin: child.stdin.take(),
            stdout: BufReader::new(child.stdout.take().expect("BUG: it is piped")),
            child,
        };
        for _ in 0..2 {
            processor.bring_id(server, neighbour.read());
        }
        neighbour
    }
}

fn output_of(command: &mut Command) -> Result<String, String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let name = Path::new(&name)
        .file_name()
        .map(PathBuf::from)
        .unwrap_or_default();
    let output = command
        .output()
        .map_err(|error| format!("{}: {error}", name.display()))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    let last = text.trim().lines().next_back().unwrap_or_default();
    Err(format!("{}: {last}", name.display()))
}

/// A process that measures one turn when it is asked to.
struct Neighbour {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Neighbour {
    fn measure(&mut self, what: &str) -> Duration {
        let stdin = self.stdin.as_mut().expect("BUG: it is piped");
        writeln!(stdin, "{what}").expect("the neighbour listens");
        Duration::from_nanos(self.read().unsigned_abs())
    }

    fn read(&mut self) -> i64 {
        let mut line = String::new();
        self.stdout
            .read_line(&mut line)
            .expect("the neighbour answers");
        line.trim()
            .parse()
            .expect("the neighbour answers with a number")
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        // It ends when its standard input does.
        self.stdin = None;
        let _ = self.child.wait();
    }
}

fn row(
    section: &mut Section,
    rows: &mut Vec<Vec<String>>,
    server: &Server,
    what: &str,
    neighbour: &str,
    outcome: &Outcome,
) {
    let bar = section.faster(
        format!("{}: {what}, against {neighbour}", server.name),
        outcome.ratio.median,
    );
    rows.push(with_bar(server, what, neighbour, outcome, bar));
}

fn with_bar(
    server: &Server,
    what: &str,
    neighbour: &str,
    outcome: &Outcome,
    bar: String,
) -> Vec<String> {
    vec![
        server.name.clone(),
        what.to_owned(),
        neighbour.to_owned(),
        spread(&outcome.ours),
        spread(&outcome.theirs),
        ratio(&outcome.ratio),
        bar,
    ]
}

pub(crate) fn run(bench: &mut Bench, python: &Result<Python, String>) -> Section {
    let mut section = Section::new("7. Neighbours");
    section.paragraph(
        "They take turns with dlock on the same server: sqlx's `PgAdvisoryLock` with both crates, and sqlalchemy-dlock, with \
         psycopg2 and PyMySQL, with dlock-diesel. Python measures itself, so that nothing but its own calls counts. A free \
         lock is acquired and released, as in section 1; a lock is handed over as in section 3, with a limit where they \
         have one. The rows of raw are section 1's raw statements on Diesel's connections, to tell a driver from a lock.",
    );
    let mut processor = OneProcessor::enter();
    let mut rows = Vec::new();
    for server in bench.of_kind(Kind::Postgres) {
        against_sqlx(bench, &mut processor, server, &mut section, &mut rows);
    }
    match python {
        Ok(python) => {
            for server in bench.servers.clone() {
                against_python(
                    bench,
                    &mut processor,
                    server,
                    python,
                    &mut section,
                    &mut rows,
                );
            }
        }
        Err(error) => section.paragraph(&format!("sqlalchemy-dlock is not measured: {error}.")),
    }
    processor.tell(&mut section);
    section.table(
        &[
            "server",
            "what",
            "against",
            "dlock",
            "the other",
            "ratio",
            "bar",
        ],
        &rows,
    );
    section.if_missed(
        "async, against sqlx",
        "Against sqlx, the bar is raw in place of dlock: what the driver takes. What dlock takes more is what section 1 \
         measures.",
    );
    section
}

const FREE: &str = "free lock";

fn open_sqlx(processor: &mut OneProcessor, server: &Server, key: &str) -> Sqlx {
    let mut session = Sqlx::open(server, key);
    processor.bring(server, &mut session);
    session
}

fn against_sqlx(
    bench: &mut Bench,
    processor: &mut OneProcessor,
    server: &'static Server,
    section: &mut Section,
    rows: &mut Vec<Vec<String>>,
) {
    let key = unique_key("bench/sqlx");
    let name = |what: String| slug(&format!("7 {} sqlx {what}", server.name));
    let pace = bench.pace(Duration::ZERO);

    for api in Api::BOTH {
        let session = RefCell::new(processor.open(api, server, &key));
        let mut theirs = open_sqlx(processor, server, &key);
        let outcome = bench.duels.fight(
            &name(format!("free {api}")),
            pace,
            &mut || pair(&mut **session.borrow_mut(), How::DLOCK),
            &mut || pair(&mut theirs, How::RawWait),
        );
        let raw = bench.duels.fight(
            &name(format!("raw {api}")),
            pace,
            &mut || pair(&mut **session.borrow_mut(), How::RawTry),
            &mut || pair(&mut theirs, How::RawWait),
        );
        // A driver that is slower than sqlx is no fault of a lock.
        let what = format!("{FREE}, {api}");
        let bar = section.at_most(
            format!("{}: {what}, against sqlx", server.name),
            outcome.ratio.median,
            (raw.ratio.median * 100.0).round() / 100.0,
            "×",
        );
        rows.push(with_bar(server, &what, "sqlx", &outcome, bar));
        rows.push(without_bar(
            server,
            &format!("raw in place of dlock, {api}"),
            &raw,
        ));

        let mut ours = HandOver::new(
            server,
            processor.open(api, server, &key),
            processor.open(api, server, &key),
        );
        let mut theirs = HandOver::new(
            server,
            Box::new(open_sqlx(processor, server, &key)),
            Box::new(open_sqlx(processor, server, &key)),
        );
        let outcome = bench.duels.fight(
            &name(format!("hand-over {api}")),
            pace,
            &mut || ours.pass(How::DLOCK, How::DLOCK).0,
            &mut || theirs.pass(How::RawWait, How::RawWait).0,
        );
        rows.push(without_bar(
            server,
            &format!("hand-over, no limit, {api}"),
            &outcome,
        ));
    }
}

fn without_bar(server: &Server, what: &str, outcome: &Outcome) -> Vec<String> {
    vec![
        server.name.clone(),
        what.to_owned(),
        "sqlx".into(),
        spread(&outcome.ours),
        spread(&outcome.theirs),
        ratio(&outcome.ratio),
        String::new(),
    ]
}

fn against_python(
    bench: &mut Bench,
    processor: &mut OneProcessor,
    server: &'static Server,
    python: &Python,
    section: &mut Section,
    rows: &mut Vec<Vec<String>>,
) {
    let key = unique_key("bench/python");
    let name = |what| slug(&format!("7 {} python {what}", server.name));
    let neighbour = RefCell::new(python.connect(server, processor));

    let mut ours = processor.open(Api::Sync, server, &key);
    let outcome = bench.duels.fight(
        &name("free"),
        bench.pace(Duration::ZERO),
        &mut || pair(&mut *ours, How::DLOCK),
        &mut || neighbour.borrow_mut().measure("free"),
    );
    row(section, rows, server, FREE, "sqlalchemy-dlock", &outcome);

    let mut ours = HandOver::new(
        server,
        processor.open(Api::Sync, server, &key),
        processor.open(Api::Sync, server, &key),
    );
    // On PostgreSQL it polls each second.
    let turn = match server.kind {
        Kind::Postgres => Duration::from_secs(1),
        Kind::Sqlite => unreachable!("BUG: SQLite is no server to measure"),
        Kind::Mysql => Duration::ZERO,
    };
    let outcome = bench.duels.fight(
        &name("hand-over"),
        bench.pace(turn),
        &mut || ours.pass(How::DLOCK, How::LIMITED).0,
        &mut || neighbour.borrow_mut().measure("hand-over"),
    );
    row(
        section,
        rows,
        server,
        "hand-over, limit of 60 s",
        "sqlalchemy-dlock",
        &outcome,
    );
}
