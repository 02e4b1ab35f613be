//! One round: processes, faults, and what is there when all have gone.

use std::fs::{self, File};
use std::io;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::proof::admin::Admin;
use crate::proof::check;
use crate::proof::clock::now;
use crate::proof::disk::Disk;
use crate::proof::fault::{Kind as FaultKind, Plan};
use crate::proof::figures::Figures;
use crate::proof::history::{History, Writer};
use crate::proof::random::Random;
use crate::proof::world::{ACCOUNTS, KEYS, SEMAPHORE, SUM, schema};
use crate::{Kind, Proxy, Server};

/// What happens in one round.
#[derive(Debug, Clone)]
pub struct Round {
    /// The server.
    pub server: Server,
    /// The program `dlock-proof`.
    pub program: PathBuf,
    /// An empty folder for the histories.
    pub folder: PathBuf,
    /// Tells the round's database, keys and seed apart from others.
    pub run: String,
    /// Everything random follows from it, but not how fast the machine is.
    pub seed: u64,
    /// How many processes; every second one has async connections.
    pub workers: u32,
    /// How many threads or tasks each has.
    pub actors: u32,
    /// What is broken.
    pub plan: Plan,
    /// The mean time from one fault to the next.
    pub pace: Duration,
    /// The round goes on for so long at least.
    pub least: Duration,
    /// Each process ends after so many operations. Then nothing is broken.
    pub operations: Option<i64>,
    /// Whether futures are dropped and bodies panic.
    pub disturbed: bool,
    /// Whether many locks are managed ones, held for long.
    pub leases: bool,
    /// How long what should happen at once may take, on the slowest machine.
    pub patience: Duration,
}

/// What a round has shown.
#[derive(Debug)]
pub struct Outcome {
    /// All that happened.
    pub history: History,
    /// What must not have happened.
    pub violations: Vec<String>,
    /// What it counts.
    pub figures: Figures,
}

/// One place for a process: when it is killed, another one takes it.
struct Slot {
    number: u32,
    life: u32,
    child: Child,
    proxy: Option<Proxy>,
    /// What ends later, and when: the process stays stopped, or its network silent, until then.
    until: Option<(Instant, FaultKind, u64)>,
}

impl Slot {
    fn name(&self) -> String {
        format!("w{}.{}", self.number, self.life)
    }
}

struct Controller<'a> {
    round: &'a Round,
    random: Random,
    writer: Writer,
    admin: Admin,
    url: String,
    disk: Option<Disk>,
    slots: Vec<Slot>,
}

impl Round {
    /// Runs it, and checks its history.
    ///
    /// # Errors
    ///
    /// If the round cannot be run: no server answers, or a file cannot be written.
    pub fn run(&self) -> Result<Outcome, String> {
        let database = format!("proof_{}", self.run);
        let mut outside = match self.server.kind {
            Kind::Sqlite => None,
            kind => Some(Admin::connect_again(kind, &self.server.url)?),
        };
        let small = self.folder.join("disk");
        let disk = match self.server.kind {
            Kind::Sqlite if self.plan.full > 0 => Some(Disk::mount(&small)?),
            _ => None,
        };
        let url = match &mut outside {
            None => {
                let folder = match &disk {
                    Some(_) => &small,
                    None => &self.folder,
                };
                folder.join("proof.db").display().to_string()
            }
            Some(outside) => {
                outside.execute(&format!("CREATE DATABASE {database}"))?;
                let mut url =
                    url::Url::parse(&self.server.url).map_err(|error| error.to_string())?;
                url.set_path(&database);
                url.to_string()
            }
        };
        let inside = Server {
            url: url.clone(),
            ..self.server.clone()
        };
        let mut admin = Admin::connect_again(self.server.kind, &url)?;
        for statement in schema() {
            admin.execute(&statement)?;
        }
        let writer = Writer::open(&self.folder.join("controller.history"))
            .map_err(|error| error.to_string())?;
        let mut controller = Controller {
            round: self,
            random: Random::new(self.seed),
            writer,
            admin,
            url,
            disk,
            slots: Vec::new(),
        };
        let begin = Instant::now();
        for number in 0..self.workers {
            // Without faults there is nothing for a proxy to do.
            let has_proxy = self.server.kind != Kind::Sqlite && self.operations.is_none();
            let proxy = has_proxy.then(|| Proxy::start(&inside));
            controller.start(number, 1, proxy)?;
        }
        if self.operations.is_none() {
            // Otherwise, on a slow machine, nothing is there that could be broken, or nobody looks at what it left behind.
            controller.wait_until_all_hold()?;
            controller.break_things()?;
            controller.wait_until_all_hold()?;
            while begin.elapsed() < self.least {
                controller.wait(Duration::from_millis(20))?;
            }
        }
        controller.end()?;
        controller.look()?;
        drop(controller);
        if let Some(mut outside) = Admin::connect_again(self.server.kind, &self.server.url)
            .ok()
            .filter(|_| outside.is_some())
        {
            // Sessions that have just ended may still be in it.
            let force = if self.server.kind == Kind::Postgres {
                " WITH (FORCE)"
            } else {
                ""
            };
            outside.execute(&format!("DROP DATABASE {database}{force}"))?;
        }
        self.judge()
    }

    fn judge(&self) -> Result<Outcome, String> {
        let mut history = History::default();
        let read = |error: io::Error| error.to_string();
        for entry in fs::read_dir(&self.folder).map_err(read)? {
            let path = entry.map_err(read)?.path();
            if path
                .extension()
                .is_some_and(|extension| extension == "history")
            {
                history.read(&fs::read_to_string(&path).map_err(read)?)?;
            }
        }
        let violations = check(&history);
        let figures = Figures::of(&history, violations.len());
        Ok(Outcome {
            history,
            violations,
            figures,
        })
    }
}

impl Controller<'_> {
    fn start(&mut self, number: u32, life: u32, proxy: Option<Proxy>) -> Result<(), String> {
        let round = self.round;
        let name = format!("w{number}.{life}");
        let path = |kind: &str| round.folder.join(format!("{name}.{kind}"));
        let mut command = Command::new(&round.program);
        command
            .arg("worker")
            .args([
                "--url",
                proxy.as_ref().map_or(&self.url, |proxy| proxy.url()),
            ])
            .args(["--run", &round.run, "--name", &name])
            .arg("--history")
            .arg(path("history"))
            .args(["--seed", &self.random.next().to_string()])
            .args(["--actors", &round.actors.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(File::create(path("stderr")).map_err(|error| error.to_string())?);
        if let Some(operations) = round.operations {
            command.args(["--operations", &operations.to_string()]);
        }
        for (flag, is_set) in [
            ("--asynchronous", number % 2 == 1),
            ("--disturbed", round.disturbed),
            ("--leases", round.leases),
        ] {
            if is_set {
                command.arg(flag);
            }
        }
        let child = command
            .spawn()
            .map_err(|error| format!("cannot start {:?}: {error}", round.program))?;
        self.slots.push(Slot {
            number,
            life,
            child,
            proxy,
            until: None,
        });
        Ok(())
    }

    fn break_things(&mut self) -> Result<(), String> {
        let mut plan = self.round.plan;
        if self.round.server.kind == Kind::Sqlite {
            plan = plan.without_server();
        }
        while let Some(kind) = plan.next(&mut self.random) {
            let pace = self.round.pace.as_millis() as u64;
            let pause = self.random.millis(pace / 2, pace * 3 / 2 + 1);
            self.wait(pause)?;
            self.fault(kind)?;
        }
        Ok(())
    }

    /// Waits until each process that is there has held a lock.
    fn wait_until_all_hold(&mut self) -> Result<(), String> {
        let begin = Instant::now();
        loop {
            let idle = self.slots.iter().map(Slot::name).find(|name| {
                let path = self.round.folder.join(format!("{name}.history"));
                !fs::read_to_string(path).is_ok_and(|history| history.contains(" in op="))
            });
            match idle {
                None => return Ok(()),
                Some(name) if begin.elapsed() > self.round.patience => {
                    self.wrong(&format!("{name} holds nothing"));
                    return Ok(());
                }
                Some(_) => self.wait(Duration::from_millis(20))?,
            }
        }
    }

    /// Waits, and ends what lasts for a while.
    fn wait(&mut self, duration: Duration) -> Result<(), String> {
        let begin = Instant::now();
        loop {
            for at in 0..self.slots.len() {
                if self.slots[at]
                    .until
                    .is_some_and(|(until, ..)| until <= Instant::now())
                {
                    self.resume(at)?;
                }
                self.still_there(at)?;
            }
            if begin.elapsed() >= duration {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(5).min(duration - begin.elapsed().min(duration)));
        }
    }

    /// A process that ends by itself is wrong.
    fn still_there(&mut self, at: usize) -> Result<(), String> {
        let ended = self.slots[at]
            .child
            .try_wait()
            .map_err(|error| error.to_string())?;
        if let (Some(status), None) = (ended, self.round.operations) {
            let mut slot = self.slots.remove(at);
            let stderr = self.round.folder.join(format!("{}.stderr", slot.name()));
            let said = fs::read_to_string(stderr).unwrap_or_default();
            self.wrong(&format!("{} ended by itself: {status} {said}", slot.name()));
            self.start(slot.number, slot.life + 1, slot.proxy.take())?;
        }
        Ok(())
    }

    fn fault(&mut self, kind: FaultKind) -> Result<(), String> {
        match kind {
            FaultKind::End | FaultKind::Cancel => {
                let Some(session) = self.any_session()? else {
                    return Ok(());
                };
                let from = now();
                match kind {
                    FaultKind::End => self.admin.end(session)?,
                    _ => self.admin.cancel(session)?,
                }
                self.note(kind, from, format_args!("session={session}"));
                return Ok(());
            }
            FaultKind::Restart => return self.restart(),
            FaultKind::Full => {
                let from = now();
                let mut filling = None;
                match &self.disk {
                    Some(disk) => disk.fill()?,
                    None => filling
                        .insert(Admin::connect_again(self.round.server.kind, &self.url)?)
                        .fill()?,
                }
                let lasts = self.random.millis(20, 300);
                self.wait(lasts)?;
                drop(filling);
                let of = match &self.disk {
                    Some(disk) => {
                        disk.clear()?;
                        "disk"
                    }
                    None => {
                        // Until there is room again.
                        self.any_session()?;
                        "locks"
                    }
                };
                self.note(kind, from, format_args!("of={of}"));
                return Ok(());
            }
            _ => {}
        }
        // One at which nothing else is broken.
        let free: Vec<usize> = (0..self.slots.len())
            .filter(|at| self.slots[*at].until.is_none())
            .collect();
        if free.is_empty() {
            self.wait(Duration::from_millis(100))?;
            return self.fault(kind);
        }
        let at = *self.random.pick(&free);
        let (lasts, short, delay) = (
            self.random.millis(300, 3500),
            self.random.millis(10, 200),
            self.random.millis(1, 30),
        );
        let slot = &mut self.slots[at];
        let pid = Pid::from_raw(slot.child.id().try_into().expect("a process"));
        let from = now();
        match (kind, &slot.proxy) {
            (FaultKind::Kill, _) => {
                slot.child
                    .kill()
                    .and_then(|()| slot.child.wait())
                    .map_err(|error| error.to_string())?;
                let name = slot.name();
                self.note(kind, from, format_args!("worker={name}"));
                let mut slot = self.slots.remove(at);
                self.start(slot.number, slot.life + 1, slot.proxy.take())?;
            }
            (FaultKind::Stop, _) => {
                kill(pid, Signal::SIGSTOP).map_err(|error| error.to_string())?;
                slot.until = Some((Instant::now() + lasts, kind, from));
            }
            (FaultKind::Cut, Some(proxy)) => {
                proxy.cut();
                let name = slot.name();
                self.note(kind, from, format_args!("worker={name}"));
            }
            (FaultKind::Half, Some(proxy)) => {
                proxy.half_close();
                let name = slot.name();
                self.note(kind, from, format_args!("worker={name}"));
            }
            (FaultKind::Answer, Some(proxy)) => {
                proxy.pause();
                slot.until = Some((Instant::now() + short, kind, from));
            }
            (FaultKind::Silence, Some(proxy)) => {
                proxy.silence();
                slot.until = Some((Instant::now() + lasts, kind, from));
            }
            (FaultKind::Delay, Some(proxy)) => {
                proxy.delay(delay);
                slot.until = Some((Instant::now() + lasts / 2, kind, from));
            }
            _ => {}
        }
        Ok(())
    }

    /// Again and again: the server may just have been broken.
    fn any_session(&mut self) -> Result<Option<i64>, String> {
        let begin = Instant::now();
        loop {
            match self.admin.any_session() {
                Err(_) if begin.elapsed() < self.round.patience => {
                    thread::sleep(Duration::from_millis(10));
                    self.admin = Admin::connect_again(self.round.server.kind, &self.url)?;
                }
                session => return session,
            }
        }
    }

    /// Ends what lasted for a while.
    fn resume(&mut self, at: usize) -> Result<(), String> {
        let cuts = self.random.percent(50);
        let slot = &mut self.slots[at];
        let Some((_, kind, from)) = slot.until.take() else {
            return Ok(());
        };
        let name = slot.name();
        match (kind, &slot.proxy) {
            (FaultKind::Stop, _) => {
                let pid = Pid::from_raw(slot.child.id().try_into().expect("a process"));
                kill(pid, Signal::SIGCONT).map_err(|error| error.to_string())?;
            }
            (FaultKind::Answer, Some(proxy)) => {
                let from = now();
                proxy.cut();
                proxy.resume();
                self.note(kind, from, format_args!("worker={name}"));
                return Ok(());
            }
            (FaultKind::Silence, Some(proxy)) => {
                let cut = now();
                if cuts {
                    proxy.cut();
                }
                proxy.resume();
                if cuts {
                    self.note(FaultKind::Cut, cut, format_args!("worker={name}"));
                }
            }
            (FaultKind::Delay, Some(proxy)) => proxy.delay(Duration::ZERO),
            _ => {}
        }
        self.note(kind, from, format_args!("worker={name}"));
        Ok(())
    }

    fn restart(&mut self) -> Result<(), String> {
        let from = now();
        self.admin.kill_server()?;
        thread::sleep(Duration::from_millis(50));
        self.admin = Admin::connect_again(self.round.server.kind, &self.url)?;
        self.note(FaultKind::Restart, from, format_args!("by=SIGKILL"));
        Ok(())
    }

    fn note(&self, kind: FaultKind, from: u64, what: std::fmt::Arguments<'_>) {
        let kind = format!("{kind:?}").to_lowercase();
        let until = now();
        self.writer.write(
            "controller",
            format_args!("fault kind={kind} from={from} until={until} {what}"),
        );
    }

    fn wrong(&self, text: &str) {
        self.writer.write(
            "controller",
            format_args!("wrong text={}", text.replace('\n', " ")),
        );
    }

    /// Lets all processes end by themselves.
    fn end(&mut self) -> Result<(), String> {
        for at in 0..self.slots.len() {
            self.resume(at)?;
        }
        if self.round.operations.is_none() {
            for slot in &mut self.slots {
                drop(slot.child.stdin.take());
            }
        }
        let (mut begin, mut written) = (Instant::now(), 0);
        for at in 0..self.slots.len() {
            let name = self.slots[at].name();
            loop {
                if let Some(status) = self.slots[at]
                    .child
                    .try_wait()
                    .map_err(|error| error.to_string())?
                {
                    if !status.success() {
                        let stderr = self.round.folder.join(format!("{name}.stderr"));
                        let said = fs::read_to_string(stderr).unwrap_or_default();
                        self.wrong(&format!("{name} ended with {status}: {said}"));
                    }
                    break;
                }
                let grown = self.written();
                if grown != written {
                    (written, begin) = (grown, Instant::now());
                }
                if begin.elapsed() > self.round.patience {
                    self.wrong(&format!("{name} hangs"));
                    let from = now();
                    let _ = self.slots[at].child.kill();
                    let _ = self.slots[at].child.wait();
                    self.note(FaultKind::Kill, from, format_args!("worker={name}"));
                    begin = Instant::now();
                    break;
                }
                thread::sleep(Duration::from_millis(5));
            }
        }
        Ok(())
    }

    /// How much all histories have.
    fn written(&self) -> u64 {
        let entries = fs::read_dir(&self.round.folder)
            .into_iter()
            .flatten()
            .flatten();
        entries
            .filter_map(|entry| Some(entry.metadata().ok()?.len()))
            .sum()
    }

    /// Looks at what is left behind.
    fn look(&mut self) -> Result<(), String> {
        let gone = now();
        self.admin = Admin::connect_again(self.round.server.kind, &self.url)?;
        let run = &self.round.run;
        let end = Instant::now() + self.round.patience;
        let left = || end.saturating_duration_since(Instant::now());
        for key in KEYS.iter().chain(&ACCOUNTS) {
            match self.admin.is_free(run, key, left())? {
                true => self.writer.write(
                    "controller",
                    format_args!("free key={key} after={}", now() - gone),
                ),
                false => self
                    .writer
                    .write("controller", format_args!("kept key={key}")),
            }
        }
        let mut permits = Vec::new();
        for _ in 0..SEMAPHORE.1 {
            let mut admin = Admin::connect_again(self.round.server.kind, &self.url)?;
            match admin.is_permitted(run, left())? {
                true => self.writer.write(
                    "controller",
                    format_args!("free key=s0 after={}", now() - gone),
                ),
                false => self.writer.write("controller", format_args!("kept key=s0")),
            }
            permits.push(admin);
        }
        drop(permits);
        for key in KEYS {
            let value = self
                .admin
                .number(&format!("SELECT n FROM counter WHERE id = '{key}'"))?
                .unwrap_or(-1);
            self.writer.write(
                "controller",
                format_args!("counter key={key} value={value}"),
            );
        }
        let mut sum = 0;
        for account in ACCOUNTS {
            sum += self
                .admin
                .number(&format!("SELECT n FROM account WHERE id = '{account}'"))?
                .unwrap_or(-1);
        }
        self.writer
            .write("controller", format_args!("sum value={sum} expected={SUM}"));
        Ok(())
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        // Has ended, unless the controller has failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
