//! Takes locks in many processes, breaks what they stand on, and checks what each of them believed: see `docs/proof.md`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Args, Parser, Subcommand};
use dlock_tests::proof::{
    Disk, Figures, History, Outcome, Plan, Round, WorkerOptions, check, picture, table, work,
};
use dlock_tests::{Kind, Server, start_lasting_mysql, start_lasting_postgres};

#[derive(Parser)]
#[command(about)]
struct Arguments {
    #[command(subcommand)]
    command: What,
}

#[derive(Subcommand)]
enum What {
    /// Runs the proof, and prints its figures as a table.
    Run(Run),
    /// Checks histories once more: files that `run` has kept.
    Check { files: Vec<PathBuf> },
    /// One of the processes that take locks. `run` starts it.
    #[command(hide = true)]
    Worker(Worker),
}

#[derive(Args)]
struct Run {
    /// Servers to use, and `sqlite`. Default: a PostgreSQL and a MySQL or MariaDB of its own, and SQLite.
    servers: Vec<String>,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Processes at once.
    #[arg(long, default_value_t = 4)]
    workers: u32,
    /// Threads or tasks of each process.
    #[arg(long, default_value_t = 3)]
    actors: u32,
    /// Futures dropped, at least.
    #[arg(long, default_value_t = 300)]
    drops: u64,
    /// Processes killed.
    #[arg(long, default_value_t = 20)]
    kills: u32,
    /// Connections cut, a fifth of them half closed and a fifth after an answer was withheld.
    #[arg(long, default_value_t = 20)]
    cuts: u32,
    /// Servers killed and started again: only servers of its own.
    #[arg(long, default_value_t = 2)]
    restarts: u32,
    /// Tables of locks full for a moment: only a PostgreSQL of its own. On SQLite disks, if it may mount one.
    #[arg(long, default_value_t = 2)]
    full: u32,
    /// Processes stopped, and as many networks silent: in rounds in which managed locks are held for long.
    #[arg(long, default_value_t = 8)]
    stops: u32,
    /// Operations without any fault.
    #[arg(long, default_value_t = 4000)]
    operations: u64,
    /// The mean time between two faults, in milliseconds.
    #[arg(long, default_value_t = 100)]
    pace: u64,
    /// Faults in one round, at most.
    #[arg(long, default_value_t = 150)]
    round: u32,
    /// Where to write a picture of one round.
    #[arg(long)]
    picture: Option<PathBuf>,
    /// How many seconds what should happen at once may take.
    #[arg(long, default_value_t = 60)]
    patience: u64,
    /// End at the first round that shows something wrong.
    #[arg(long)]
    first: bool,
    /// Where to keep the histories of rounds that show something wrong.
    #[arg(long, default_value = "target/proof")]
    keep: PathBuf,
}

#[derive(Args)]
struct Worker {
    #[arg(long)]
    url: String,
    #[arg(long)]
    run: String,
    #[arg(long)]
    name: String,
    #[arg(long)]
    history: PathBuf,
    #[arg(long)]
    seed: u64,
    #[arg(long)]
    actors: u32,
    #[arg(long)]
    operations: Option<i64>,
    #[arg(long)]
    asynchronous: bool,
    #[arg(long)]
    disturbed: bool,
    #[arg(long)]
    leases: bool,
}

fn main() -> ExitCode {
    let done = match Arguments::parse().command {
        What::Run(run) => run.run(),
        What::Check { files } => check_files(&files),
        What::Worker(worker) => {
            let Worker {
                url,
                run,
                name,
                history,
                seed,
                actors,
                operations,
                asynchronous,
                disturbed,
                leases,
            } = worker;
            work(WorkerOptions {
                url,
                run,
                name,
                history,
                seed,
                asynchronous,
                actors,
                operations,
                disturbed,
                leases,
            });
            Ok(true)
        }
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("dlock-proof: {error}");
            ExitCode::from(2)
        }
    }
}

fn check_files(files: &[PathBuf]) -> Result<bool, String> {
    let mut history = History::default();
    for file in files {
        history.read(
            &fs::read_to_string(file).map_err(|error| format!("{}: {error}", file.display()))?,
        )?;
    }
    let violations = check(&history);
    for violation in &violations {
        println!("{violation}");
    }
    println!("{} violations", violations.len());
    Ok(violations.is_empty())
}

/// Prints how long each phase took.
struct Phase(Instant);

impl Phase {
    fn begin() -> Self {
        Self(Instant::now())
    }

    fn end(&mut self, name: &str) {
        println!("  {name}: {:.1} s", self.0.elapsed().as_secs_f64());
        self.0 = Instant::now();
    }
}

/// A server, and whether it may be killed: then it is started again.
type Place = (Server, bool);

impl Run {
    fn run(&self) -> Result<bool, String> {
        let mut columns = Vec::new();
        for place in self.places()? {
            let name = place.0.name.clone();
            println!("{name}, seed {}", self.seed);
            columns.push((name, self.on(&place, columns.is_empty())?));
        }
        print!("\n{}", table(&columns));
        Ok(columns.iter().all(|(_, figures)| figures.violations == 0))
    }

    fn places(&self) -> Result<Vec<Place>, String> {
        let sqlite = Server {
            kind: Kind::Sqlite,
            name: "SQLite".to_owned(),
            url: String::new(),
        };
        if self.servers.is_empty() {
            return Ok(vec![
                (start_lasting_postgres()?, true),
                (start_lasting_mysql()?, true),
                (sqlite, false),
            ]);
        }
        let mut places = Vec::new();
        for server in &self.servers {
            places.push(match server.as_str() {
                "sqlite" => (sqlite.clone(), false),
                "postgres" => (start_lasting_postgres()?, true),
                "mysql" => (start_lasting_mysql()?, true),
                url => (dlock_tests::servers_from(url)?.remove(0), false),
            });
        }
        Ok(places)
    }

    /// All rounds on one server.
    fn on(&self, (server, lasts): &Place, is_first: bool) -> Result<Figures, String> {
        let mut sum = Figures::default();
        let mut number = 0;
        let mut left = Plan {
            kill: self.kills / 2,
            cut: self.cuts - 2 * (self.cuts / 5),
            half: self.cuts / 5,
            answer: self.cuts / 5,
            end: self.cuts,
            cancel: self.cuts,
            delay: self.cuts / 10,
            restart: if *lasts { self.restarts } else { 0 },
            full: match server.kind {
                Kind::Postgres if *lasts => self.full,
                Kind::Sqlite if self.full > 0 && can_mount() => self.full,
                _ => 0,
            },
            ..Plan::default()
        };
        if server.kind == Kind::Sqlite {
            left = left.without_server();
        }
        let mut leases = Plan {
            kill: self.kills - self.kills / 2,
            stop: self.stops,
            silence: self.stops,
            delay: self.stops / 2,
            ..Plan::default()
        };
        if server.kind == Kind::Sqlite {
            leases = leases.without_server();
        }
        let mut drawn = false;
        let mut phase = Phase::begin();
        for (mut plan, is_leases) in [(left, false), (leases, true)] {
            while count(&plan) > 0 {
                let part = take(&mut plan, self.round);
                number += 1;
                let outcome = self.round(server, number, part, None, is_leases, &mut sum)?;
                if let Some(path) = self
                    .picture
                    .as_ref()
                    .filter(|_| is_first && !is_leases && !drawn)
                {
                    drawn = true;
                    let title = format!("{}, seed {}", server.name, self.seed);
                    fs::write(path, picture(&outcome.history, &title, 1_500_000_000))
                        .map_err(|error| error.to_string())?;
                }
            }
            phase.end(if is_leases { "leases" } else { "faults" });
        }
        while sum.dropped < self.drops {
            number += 1;
            self.round(server, number, Plan::default(), Some(1000), false, &mut sum)?;
        }
        phase.end("dropped futures");
        let mut calm = Figures::default();
        while calm.operations < self.operations {
            number += 1;
            let each = (self.operations - calm.operations)
                .min(100_000)
                .div_ceil(self.workers.into());
            let before = sum.operations;
            self.calm(server, number, each as i64, &mut sum)?;
            calm.operations += sum.operations - before;
        }
        phase.end(&format!("{} operations without any fault", calm.operations));
        Ok(sum)
    }

    fn calm(
        &self,
        server: &Server,
        number: u64,
        each: i64,
        sum: &mut Figures,
    ) -> Result<(), String> {
        let mut round = self.prepared(server, number, Plan::default(), Some(each), false)?;
        round.disturbed = false;
        self.finish(&round, sum).map(drop)
    }

    fn round(
        &self,
        server: &Server,
        number: u64,
        plan: Plan,
        operations: Option<i64>,
        leases: bool,
        sum: &mut Figures,
    ) -> Result<Outcome, String> {
        let round = self.prepared(server, number, plan, operations, leases)?;
        self.finish(&round, sum)
    }

    fn prepared(
        &self,
        server: &Server,
        number: u64,
        plan: Plan,
        operations: Option<i64>,
        leases: bool,
    ) -> Result<Round, String> {
        let run = format!("{}_{}_{number}", std::process::id(), self.seed);
        let folder = std::env::temp_dir().join(format!("dlock-proof-{run}"));
        fs::create_dir_all(&folder).map_err(|error| error.to_string())?;
        Ok(Round {
            server: server.clone(),
            program: std::env::current_exe().map_err(|error| error.to_string())?,
            folder,
            run,
            seed: self.seed.wrapping_mul(1_000_003).wrapping_add(number),
            workers: self.workers,
            actors: self.actors,
            plan,
            pace: Duration::from_millis(self.pace),
            least: Duration::from_millis(500),
            operations,
            disturbed: true,
            leases,
            patience: Duration::from_secs(self.patience),
        })
    }

    fn finish(&self, round: &Round, sum: &mut Figures) -> Result<Outcome, String> {
        if self.first && sum.violations > 0 {
            return Err("stopped at the first round that shows something wrong".to_owned());
        }
        let outcome = round.run()?;
        sum.add(&outcome.figures);
        let figures = &outcome.figures;
        println!(
            "  round seed {}: {} operations, {} holds, {:?}, {:?}, {} violations",
            round.seed,
            figures.operations,
            figures.holds,
            figures.faults,
            figures.results,
            figures.violations
        );
        for violation in outcome.violations.iter().take(10) {
            println!("    {violation}");
        }
        if !outcome.violations.is_empty() {
            keep(&round.folder, &self.keep.join(&round.run)).map_err(|error| error.to_string())?;
            println!(
                "    its histories are in {}",
                self.keep.join(&round.run).display()
            );
        }
        fs::remove_dir_all(&round.folder).map_err(|error| error.to_string())?;
        Ok(outcome)
    }
}

fn keep(from: &Path, to: &Path) -> std::io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let path = entry?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "history" || extension == "stderr")
        {
            fs::copy(&path, to.join(path.file_name().unwrap_or_default()))?;
        }
    }
    Ok(())
}

/// Faults of each kind.
fn each(plan: &mut Plan) -> [&mut u32; 11] {
    let Plan {
        kill,
        stop,
        end,
        cancel,
        cut,
        half,
        answer,
        silence,
        delay,
        restart,
        full,
    } = plan;
    [
        kill, stop, end, cancel, cut, half, answer, silence, delay, restart, full,
    ]
}

fn count(plan: &Plan) -> u32 {
    let mut plan = *plan;
    each(&mut plan).iter().map(|count| **count).sum()
}

fn can_mount() -> bool {
    let folder = std::env::temp_dir().join(format!("dlock-proof-disk-{}", std::process::id()));
    let can = match Disk::mount(&folder) {
        Ok(_) => true,
        Err(error) => {
            println!(
                "  SKIPPED: full disks. A small one cannot be mounted ({error}): run it as root"
            );
            false
        }
    };
    let _ = fs::remove_dir(&folder);
    can
}

/// A part of the plan, of each kind as many as its share.
fn take(plan: &mut Plan, most: u32) -> Plan {
    let all = count(plan);
    let mut part = Plan::default();
    for (of, to) in each(plan).into_iter().zip(each(&mut part)) {
        *to = (*of * most.min(all)).div_ceil(all).min(*of);
        *of -= *to;
    }
    part
}
