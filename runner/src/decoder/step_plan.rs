//! What a decoding step feeds and reads: how many tokens of the window, and how many pages.
//!
//! A token whose own step read every page has nothing to gain from being fed again: no page is new to it
//! (docs/method.md). So the window opens with the first step that leaves pages out.

use retro_contract::{Budget, metadata::ONE_TOKEN_DENSE_BELOW, pages_for};

use crate::decoder::{
    error::{Error, Result, require},
    model::Model,
    state_slot::SlotKind,
};

/// What a decoding step feeds and reads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Policy {
    /// The window w: a step feeds up to w tokens; 1 is Quest, without correction.
    pub window: usize,
    /// Pages that a step reads; `None`: as converted.
    pub budget: Option<Budget>,
    /// Contexts of up to so many tokens are read whole, one token a step.
    pub dense_below: usize,
    /// A rectifying pass comes after so many decoded tokens: dense attention writes their keys and values anew (ReSA,
    /// arXiv 2506.04108). `None`: none does.
    pub rectify: Option<usize>,
}

impl Policy {
    /// A policy, with the converted model's window where none is given. Where no budget is given either, contexts are
    /// read whole up to the length that the model was converted with: below it, on a CPU, the other tokens of the window
    /// cost more time than reading everything. With one token a step the length is
    /// [`ONE_TOKEN_DENSE_BELOW`] at most.
    ///
    /// # Errors
    /// When the model was converted for a smaller window, or takes no budget at run time.
    pub fn new(model: &Model, window: Option<usize>, budget: Option<Budget>) -> Result<Self> {
        let window = model.window(window)?;
        if budget.is_some() {
            require!(model.retro.is_some(), Error::BudgetOfUnconverted);
            require!(model.io.page_budget.is_some(), Error::NoBudgetInput);
        }
        let by_length = budget.is_none() && !model.feeds_from_buffers() && model.io.page_budget.is_some();
        let policy = Self {
            window,
            budget,
            dense_below: model.retro.as_ref().filter(|_| by_length).map_or(0, |r| r.dense_below),
            rectify: None,
        };
        Ok(policy.with_window(window))
    }

    /// The same policy with another window, which reads contexts whole no further than that window gains from.
    pub fn with_window(self, window: usize) -> Self {
        let most = if window > 1 { usize::MAX } else { ONE_TOKEN_DENSE_BELOW };
        Self {
            window,
            dense_below: self.dense_below.min(most),
            ..self
        }
    }

    /// The same, but for contexts of up to `tokens` tokens, which are read whole.
    ///
    /// # Errors
    /// When the model was not converted, or takes no budget at run time.
    pub fn dense_below(self, model: &Model, tokens: usize) -> Result<Self> {
        require!(model.retro.is_some(), Error::DenseBelowOfUnconverted);
        require!(model.io.page_budget.is_some(), Error::DenseBelowWithoutBudget);
        Ok(Self {
            dense_below: tokens,
            ..self
        })
    }

    /// The policy with a rectifying pass every `tokens` tokens, or with none.
    ///
    /// # Errors
    /// When `tokens` is 0 or exceeds the model's context, the model was not converted, or it has state that cannot go
    /// back.
    pub fn rectified(self, model: &Model, tokens: Option<usize>) -> Result<Self> {
        let policy = Self {
            rectify: tokens,
            ..self
        };
        if let Some(asked) = tokens {
            require!(asked > 0, Error::RectifyNothing);
            require!(model.retro.is_some(), Error::RectifyUnconverted(asked));
            let slots = &model.io.slots;
            require!(
                slots.iter().all(|s| s.kind != SlotKind::Recurrent),
                Error::RectifyRecurrent(asked)
            );
            policy.fits(model.context_length().unwrap_or(usize::MAX))?;
        }
        Ok(policy)
    }

    /// Whether the tokens between two rectifying passes fit a context.
    ///
    /// # Errors
    /// When they don't.
    pub fn fits(&self, context: usize) -> Result<()> {
        match self.rectify.filter(|&asked| asked > context) {
            Some(asked) => Err(Error::RectifyContext { asked, context }),
            None => Ok(()),
        }
    }
}

/// A step.
#[derive(Debug, PartialEq)]
pub(crate) struct StepPlan {
    /// Tokens that are fed again.
    pub retrospective: usize,
    /// Pages that each sequence reads; `None`: as converted.
    pub budgets: Option<Vec<i32>>,
}

/// Plans the steps of a decoding loop, one after another.
#[derive(Clone, Debug)]
pub(crate) struct StepPlanner {
    policy: Policy,
    /// How the model was converted; `None`: it was not, and reads everything.
    paging: Option<Paging>,
    /// Steps from the first on that left pages out.
    correctable: usize,
}

/// What decides how many pages a step reads.
#[derive(Clone, Copy, Debug)]
struct Paging {
    page_size: usize,
    min_pages: usize,
    /// The policy's, else as converted; `None`: unknown.
    budget: Option<Budget>,
    /// Steps are of one shape as soon as they can be, for a CUDA graph.
    of_one_shape: bool,
}

impl StepPlanner {
    /// For the steps of `model` under `policy`.
    pub fn new(model: &Model, policy: Policy) -> Self {
        let paging = model.retro.as_ref().map(|retro| Paging {
            page_size: retro.page_size,
            min_pages: retro.min_pages,
            budget: policy.budget.or(retro.budget),
            of_one_shape: model.feeds_from_buffers(),
        });
        Self {
            policy,
            paging,
            correctable: 0,
        }
    }

    /// Closes the window: a prefill has written what earlier steps decoded.
    pub fn close(&mut self) {
        self.correctable = 0;
    }

    /// Whether a step of `length` valid tokens reads all of them.
    pub fn reads_all(&self, length: usize) -> bool {
        let Some(paging) = self.paging else { return true };
        let pages = self.pages(paging, length);
        pages.is_some_and(|pages| pages >= pages_for(length, paging.page_size))
    }

    fn is_whole(&self, length: usize) -> bool {
        length <= self.policy.dense_below
    }

    /// Pages that a step of `length` valid tokens reads; `None`: unknown.
    fn pages(&self, paging: Paging, length: usize) -> Option<usize> {
        if self.is_whole(length) {
            return Some(pages_for(length, paging.page_size));
        }
        let budget = paging.budget?;
        Some(budget.pages(paging.min_pages, length, paging.page_size).max(1))
    }

    /// The next step, given the valid tokens of every sequence, its newest included.
    pub fn next(&mut self, lengths: &[usize]) -> StepPlan {
        let retrospective = self.policy.window.saturating_sub(1).min(self.correctable);
        let Some(paging) = self.paging else {
            return StepPlan {
                retrospective,
                budgets: None,
            };
        };
        if self.correctable > 0 || paging.of_one_shape || !lengths.iter().all(|&n| self.reads_all(n)) {
            self.correctable += 1;
        }
        let told = self.policy.budget.is_some() || lengths.iter().any(|&n| self.is_whole(n));
        // 0: as converted.
        let number = |&n: &usize| {
            let pages = self.pages(paging, n);
            pages.map_or(0, |pages| i32::try_from(pages).unwrap_or(i32::MAX))
        };
        StepPlan {
            retrospective,
            budgets: told.then(|| lengths.iter().map(number).collect()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planner(window: usize, budget: Option<Budget>, dense_below: usize) -> StepPlanner {
        StepPlanner {
            policy: Policy {
                window,
                budget,
                dense_below,
                rectify: None,
            },
            paging: Some(Paging {
                page_size: 8,
                min_pages: 4,
                budget: budget.or(Some(Budget::Ratio(0.1))),
                of_one_shape: false,
            }),
            correctable: 0,
        }
    }

    fn rows(mut planner: StepPlanner, lengths: std::ops::Range<usize>) -> Vec<usize> {
        lengths.map(|n| planner.next(&[n]).retrospective).collect()
    }

    #[test]
    fn the_window_opens_with_the_first_step_that_leaves_pages_out() {
        // Four pages are 32 tokens: the 33rd is the first that does not read everything, and the next one corrects it.
        assert_eq!(rows(planner(3, None, 0), 30..38), [0, 0, 0, 0, 1, 2, 2, 2]);
        assert_eq!(rows(planner(3, None, 0), 100..104), [0, 1, 2, 2]);
        assert_eq!(rows(planner(1, None, 0), 100..103), [0, 0, 0]);
        assert_eq!(rows(planner(4, Some(Budget::Ratio(1.0)), 0), 100..106), [0; 6]);
        // One sequence that leaves pages out is enough.
        let mut batch = planner(2, None, 0);
        assert_eq!(batch.next(&[20, 40]).retrospective, 0);
        assert_eq!(batch.next(&[21, 41]).retrospective, 1);
        // A model whose budget is unknown may leave out any.
        let mut unknown = planner(2, None, 0);
        unknown.paging.as_mut().unwrap().budget = None;
        assert_eq!(rows(unknown, 8..11), [0, 1, 1]);
    }

    #[test]
    fn steps_of_one_shape_do_not_wait() {
        let mut planner = planner(3, None, 0);
        planner.paging.as_mut().unwrap().of_one_shape = true;
        assert_eq!(rows(planner, 8..12), [0, 1, 2, 2]);
    }

    #[test]
    fn short_contexts_are_read_whole() {
        let mut planner = planner(2, None, 100);
        let mut plan = |n: usize| planner.next(&[n]);
        let whole = StepPlan {
            retrospective: 0,
            budgets: Some(vec![13]),
        };
        assert_eq!(
            (plan(99), plan(100)),
            (
                StepPlan {
                    budgets: Some(vec![13]),
                    ..plan(99)
                },
                whole
            )
        );
        let as_converted = |retrospective| StepPlan {
            retrospective,
            budgets: None,
        };
        assert_eq!((plan(101), plan(102)), (as_converted(0), as_converted(1)));
    }

    #[test]
    fn a_batch_gets_numbers_for_all_or_for_none() {
        let mut planner = planner(2, None, 100);
        assert_eq!(planner.next(&[50, 200]).budgets, Some(vec![7, 4]));
        assert_eq!(planner.next(&[101, 201]).budgets, None);
    }
}
