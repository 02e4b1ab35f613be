use std::io::{self, ErrorKind};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;

/// A number of seconds on the command line.
pub(crate) fn seconds(text: &str) -> crate::support::Result<Duration> {
    Ok(Duration::try_from_secs_f64(text.parse()?)?)
}

/// Runs a command and tells its exit status as a shell does.
pub(crate) fn run(command: &[String]) -> u8 {
    match wait_for(command) {
        Ok(status) => {
            let signal = status.signal().unwrap_or_default();
            status.code().unwrap_or(128 + signal) as u8
        }
        Err(error) => {
            eprintln!("error: {}: {error}", command[0]);
            if error.kind() == ErrorKind::NotFound {
                127
            } else {
                126
            }
        }
    }
}

/// Outlives the command whatever happens, for the end of this process frees the lock: signals end the command only.
fn wait_for(command: &[String]) -> io::Result<ExitStatus> {
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGQUIT, SIGTERM])?;
    let mut child = Command::new(&command[0]).args(&command[1..]).spawn()?;
    let pid = Pid::from_raw(child.id().try_into().expect("a process id fits"));
    thread::spawn(move || {
        for signal in signals.forever() {
            // The others come from the terminal, which sends them to the command, too.
            if signal == SIGTERM || signal == SIGHUP {
                let _ = kill(pid, Signal::try_from(signal).ok());
            }
        }
    });
    child.wait()
}
