//! Ctrl-C (SIGINT) and SIGTERM: the first asks the running work to stop, the second ends the program.

use std::{
    fmt, io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use signal_hook::{
    consts::{SIGINT, SIGTERM},
    flag,
};

/// A request to stop, shared by its clones.
#[derive(Clone, Debug, Default)]
pub struct Interrupt {
    /// The signal's number; 0: not asked to stop.
    signal: Arc<AtomicUsize>,
}

impl Interrupt {
    /// The signal that asked to stop, if one did.
    pub fn raised(&self) -> Option<Interrupted> {
        match self.signal.load(Ordering::SeqCst) {
            0 => None,
            signal => Some(Interrupted { signal }),
        }
    }

    /// Requests a stop, as the signal of that number does.
    pub fn raise(&self, signal: usize) {
        self.signal.store(signal, Ordering::SeqCst);
    }

    /// # Errors
    /// [`Interrupted`], once asked to stop.
    pub fn check(&self) -> Result<(), Interrupted> {
        self.raised().map_or(Ok(()), Err)
    }
}

/// The error of work that was stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interrupted {
    signal: usize,
}

impl Interrupted {
    /// Whether the signal is SIGINT, as Ctrl-C sends it.
    pub fn is_ctrl_c(self) -> bool {
        i32::try_from(self.signal) == Ok(SIGINT)
    }

    /// The exit code by the shell's convention: 130 for SIGINT, 143 for SIGTERM.
    pub fn exit_code(self) -> u8 {
        u8::try_from(self.signal + 128).unwrap_or(u8::MAX)
    }
}

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match i32::try_from(self.signal) {
            Ok(SIGINT) => write!(f, "interrupted"),
            Ok(SIGTERM) => write!(f, "terminated"),
            _ => write!(f, "ended by signal {}", self.signal),
        }
    }
}

impl std::error::Error for Interrupted {}

/// The program's signals.
pub struct Signals {
    interrupt: Interrupt,
    /// The next signal ends the program at once.
    at_once: Arc<AtomicBool>,
}

impl Signals {
    /// Installs handlers of SIGINT and SIGTERM. Until [`listen`](Self::listen) is called they end the program with exit
    /// code 130 or 143.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn install() -> io::Result<Self> {
        let (interrupt, at_once) = (Interrupt::default(), Arc::new(AtomicBool::new(true)));
        for signal in [SIGINT, SIGTERM] {
            // In this order: the first signal finds the flag as it was and sets it for the second.
            flag::register_conditional_shutdown(signal, signal + 128, Arc::clone(&at_once))?;
            flag::register_usize(signal, Arc::clone(&interrupt.signal), signal as usize)?;
            flag::register(signal, Arc::clone(&at_once))?;
        }
        Ok(Self { interrupt, at_once })
    }

    /// From now on the first signal raises the returned request, and the second ends the program.
    pub fn listen(&self) -> Interrupt {
        self.at_once.store(false, Ordering::SeqCst);
        self.interrupt.clone()
    }

    /// The work that listened is done: its request is taken back, and signals end the program until the next
    /// [`listen`](Self::listen).
    pub fn rest(&self) {
        self.at_once.store(true, Ordering::SeqCst);
        self.interrupt.signal.store(0, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_share_the_request_and_the_code_is_the_shells() {
        let one = Interrupt::default();
        let two = one.clone();
        assert!(two.check().is_ok());
        one.raise(SIGTERM as usize);
        let error = two.check().unwrap_err();
        assert_eq!((error.exit_code(), error.to_string().as_str()), (143, "terminated"));
        one.raise(SIGINT as usize);
        assert_eq!(two.raised().unwrap().exit_code(), 130);
        assert!(Interrupt::default().raised().is_none());
    }
}
