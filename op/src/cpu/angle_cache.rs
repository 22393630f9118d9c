//! The rotary angles that a task used last.

/// The angles of the position that was rotated last: a token's heads follow one another.
#[derive(Default)]
pub struct AngleCache {
    pub position: Option<usize>,
    /// Cosines, then sines.
    pub values: Vec<f32>,
}

impl AngleCache {
    /// Forgets them: another call may have other tables.
    pub fn clear(&mut self) {
        self.position = None;
    }
}
