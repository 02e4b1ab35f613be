use std::io::{self, ErrorKind};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};
use std::thread;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;

/// Runs a command and returns its exit status as a shell would.
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

/// Waits until the command has ended. The lock is free when this process ends, so a signal may end the command only.
fn wait_for(command: &[String]) -> io::Result<ExitStatus> {
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGQUIT, SIGTERM])?;
    let mut child = Command::new(&command[0]).args(&command[1..]).spawn()?;
    let pid = Pid::from_raw(child.id().try_into().expect("a process id fits"));
    thread::spawn(move || {
        for signal in signals.forever() {
            // The terminal sends SIGINT and SIGQUIT to the command itself.
            if signal == SIGTERM || signal == SIGHUP {
                let _ = kill(pid, Signal::try_from(signal).ok());
            }
        }
    });
    child.wait()
}
