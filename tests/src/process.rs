use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, RecvTimeoutError, channel},
    },
    thread,
    time::Duration,
};

use crate::{PATIENCE, test_urls, wait_for};

/// The program `dlock-child` with its arguments, ready for [`Process::spawn`].
#[macro_export]
macro_rules! dlock_child {
    ($($argument:expr),* $(,)?) => {{
        let mut command = ::std::process::Command::new(env!("CARGO_BIN_EXE_dlock-child"));
        $(command.arg($argument);)*
        command
    }};
}

/// A process of its own, spoken to in lines over its standard input and output. Killed when dropped.
///
/// It finds the servers of this process in `TEST_URLS`. A process that ends when its standard input does, ends even if
/// this one is killed.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<String>,
    stderr: Arc<Mutex<String>>,
}

impl Process {
    /// Starts `command`: see [`dlock_child!`](crate::dlock_child).
    ///
    /// # Panics
    ///
    /// If it cannot be started.
    #[track_caller]
    pub fn spawn(mut command: Command) -> Self {
        command.env("TEST_URLS", test_urls());
        Self::spawn_without_servers(command)
    }

    /// As [`spawn`](Self::spawn), for a process that is told all it needs: no server is started for it.
    ///
    /// # Panics
    ///
    /// If it cannot be started.
    #[track_caller]
    pub fn spawn_without_servers(mut command: Command) -> Self {
        let name = format!("{command:?}");
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = match command.spawn() {
            Ok(child) => child,
            Err(error) => panic!("cannot start {name}: {error}"),
        };
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().expect("BUG: stdout is piped");
        let child_stderr = child.stderr.take().expect("BUG: stderr is piped");

        let (sender, lines) = channel();
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        let stderr = Arc::new(Mutex::new(String::new()));
        thread::spawn({
            let stderr = Arc::clone(&stderr);
            move || {
                let mut reader = BufReader::new(child_stderr);
                let mut line = Vec::new();
                while reader
                    .read_until(b'\n', &mut line)
                    .is_ok_and(|length| length > 0)
                {
                    let mut all = stderr.lock().unwrap_or_else(PoisonError::into_inner);
                    all.push_str(&String::from_utf8_lossy(&line));
                    line.clear();
                }
            }
        });
        Self {
            name,
            child,
            stdin,
            lines,
            stderr,
        }
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a line.
    ///
    /// # Panics
    ///
    /// If it has ended.
    #[track_caller]
    pub fn send(&mut self, line: &str) {
        let stdin = self
            .stdin
            .as_mut()
            .expect("the process's standard input is closed");
        if let Err(error) = writeln!(stdin, "{line}") {
            panic!("cannot send {line:?}: {error}: {}", self.describe());
        }
    }

    /// Closes its standard input.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// The next line that it prints.
    ///
    /// # Panics
    ///
    /// If none comes within [`PATIENCE`], or it ends before; with what it wrote to standard error.
    #[track_caller]
    pub fn line(&mut self) -> String {
        match self.lines.recv_timeout(PATIENCE) {
            Ok(line) => line,
            Err(RecvTimeoutError::Timeout) => {
                panic!(
                    "no line within {} s from {}",
                    PATIENCE.as_secs(),
                    self.describe()
                )
            }
            Err(RecvTimeoutError::Disconnected) => {
                panic!("no line, but the end of {}", self.describe())
            }
        }
    }

    /// Waits for the next line, which must be `expected`.
    ///
    /// # Panics
    ///
    /// If it is another, or none comes within [`PATIENCE`]; with what the process wrote to standard error.
    #[track_caller]
    pub fn expect_line(&mut self, expected: &str) {
        let line = self.line();
        assert!(
            line == expected,
            "expected {expected:?}, not {line:?}, from {}",
            self.describe()
        );
    }

    /// Whether it stays silent for `duration`. Proof of nothing by itself: look at the server's state, too.
    pub fn is_silent_for(&self, duration: Duration) -> bool {
        matches!(
            self.lines.recv_timeout(duration),
            Err(RecvTimeoutError::Timeout)
        )
    }

    /// Closes its standard input and waits for its end.
    ///
    /// # Panics
    ///
    /// If it does not end within [`PATIENCE`].
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        self.close_stdin();
        let mut status = None;
        wait_for(format!("the end of {}", self.name), || {
            status = self.child.try_wait().expect("a child can be waited for");
            status.is_some()
        });
        status.expect("BUG: the process has ended")
    }

    /// Kills it with SIGKILL: no destructor runs there, no goodbye reaches the server.
    pub fn kill9(&mut self) {
        // Fails if it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    fn describe(&self) -> String {
        let stderr = self.stderr.lock().unwrap_or_else(PoisonError::into_inner);
        format!("{}; its standard error:\n{stderr}", self.name)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill9();
    }
}
